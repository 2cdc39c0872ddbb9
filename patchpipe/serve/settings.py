"""What an operator decides of a service: where it listens, who may use it, and how much one request may ask for."""

from __future__ import annotations

import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from patchpipe.scheduling import DEFAULT_SCALE, policy_named

LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how many may wait.

    Attributes:
        pixels: Of one picture, or of one frame of a clip.
        frames: Of a clip.
        steps: Of denoising.
        prompt: Characters of a prompt, and of a negative prompt.
        pictures: Of one request (``n``).
        previews: Of one streamed picture.
        body: Bytes of a request's body.
        upload_pixels: Of one uploaded picture, before it is decoded.
        waiting: Requests that wait for their turn.
    """

    pixels: int = 2048 * 2048
    frames: int = 257
    steps: int = 200
    prompt: int = 32_000
    pictures: int = 10
    previews: int = 10
    body: int = 64 * 2**20
    upload_pixels: int = 32 * 2**20
    waiting: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < (0 if name == "previews" else 1):
                raise ValueError(f"the limit of {name} is {value!r}: it must be a whole number of 1 or more")


@dataclass(frozen=True)
class Settings:
    """A service's settings.

    Attributes:
        host: The address it listens on.
        port: Its port; 0 takes a free one.
        api_keys: Keys of which a client must have one; none lets everybody in, on loopback only.
        origins: Pages of other origins that browsers may call it from, such as ``https://studio.example``.
        folder: Where clips are kept, and the queue's database unless ``database`` names another.
        database: URL of the database, as SQLAlchemy takes it; ``None`` is SQLite in ``folder``.
        keep_hours: Hours after which a finished clip is deleted.
        lora_folder: ``.safetensors`` files that requests may name; ``None`` takes no LoRA.
        in_flight: Pictures painted together at most.
        policy: Who has which devices next; see ``scheduling.POLICIES``.
        deadline_scale: Deadlines of requests that name none, times their seconds alone on the idle machine.
        admission: Whether requests that cannot be in time are turned away at once.
        drain_seconds: Seconds that pictures under way get to end after SIGTERM.
        otlp: Address of an OpenTelemetry collector that is told of every request; ``None`` tells nobody.
        drain_delay: Seconds between "not ready" and the end of accepting, for a load balancer to notice.
        limits: How much one request may ask for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    folder: Path = Path("patchpipe-serve")
    database: str | None = field(default=None, repr=False)
    keep_hours: float = 24.0
    lora_folder: Path | None = None
    in_flight: int = 1
    policy: str = "balanced"
    deadline_scale: float = DEFAULT_SCALE
    admission: bool = False
    drain_seconds: float = 60.0
    otlp: str | None = field(default=None, repr=False)
    drain_delay: float = 0.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached by others, who could use this machine: give --api-key-file FILE, "
                "or the key in the environment as PATCHPIPE_API_KEY, or leave --host out to serve this machine alone"
            )
        if any(len(key) < 16 for key in self.api_keys):
            raise ValueError("an API key must have 16 characters or more: make one with `openssl rand -hex 24`")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} must be from 0 (a free one) to 65535")
        for name in ("keep_hours", "drain_seconds", "drain_delay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if self.in_flight < 1:
            raise ValueError(f"--in-flight {self.in_flight} must be 1 or more")
        policy_named(self.policy)  # refuses what is none
        if not 0 < self.deadline_scale < float("inf"):
            raise ValueError(f"--deadline-scale {self.deadline_scale} must be above 0")
        if self.otlp is not None and not re.match(r"https?://[^/]", self.otlp):
            raise ValueError(f"--otlp {self.otlp} must be the address of a collector such as http://localhost:4318")
        for origin in self.origins:
            if "://" not in origin or origin.rstrip("/") != origin:
                raise ValueError(f"--cors-origin {origin} must be an origin such as https://studio.example")

    def admits(self, key: str | None) -> bool:
        """Whether a client with this key may come in; takes the same time whatever the key."""
        if not self.api_keys:
            return True
        given = sha256((key or "").encode()).digest()
        matches = [hmac.compare_digest(given, sha256(known.encode()).digest()) for known in self.api_keys]
        return any(matches)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None, environment: str | None) -> tuple[str, ...]:
    """The API keys of a file, one a line, and of the environment, apart by commas.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no key in it.
    """
    keys = [key.strip() for key in (environment or "").split(",")]
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--api-key-file {file}: there is no such file")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"--api-key-file {file} holds no key: write one a line")
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key))
