"""What this machine has: asked in a process of its own, so that the command itself stays light and holds no card.

python -m bench.gpu.machine
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.setting import NCCL_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
CARRIED = (ROOT / ".nccl" / "libnccl.so.2", ROOT / ".nccl" / "libnccl.so.2.xz")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton")
NEEDED = ("torch", "diffusers", "transformers", "safetensors", "tokenizers", "PIL", "tqdm")
PATIENCE = 120.0


def asked(env: dict[str, str]) -> dict[str, Any]:
    """What ``look`` says in a process with this environment.

    Raises:
        RuntimeError: It fell over; says how.
    """
    command = [sys.executable, "-m", "bench.gpu.machine"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise RuntimeError(f"torch does not start here:\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def look() -> dict[str, Any]:
    """What is installed here, and which cards there are."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
        **{name: _version(name) for name in PACKAGES},
        "gpus": 0, "card": "", "memory": 0, "capability": "", "cuda": None, "nccl": 0,
    }  # fmt: skip
    if found["torch"] is None:
        return found
    import torch

    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": torch.cuda.device_count(), "card": about.name, "memory": about.total_memory,
            "capability": f"{about.major}.{about.minor}", "cudnn": torch.backends.cudnn.version(), "nccl": _nccl(),
            "driver": _driver(),
        }  # fmt: skip
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nccl() -> int:
    """The version of the NCCL that is loaded, which need not be the one that torch was built with."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return 0
    return number.value


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    return (done.stdout.strip().splitlines() or [None])[0]


# -- what is brought along ---------------------------------------------------------------------------


def environment(nccl: Path | None, site: Path | None, scratch: Path) -> dict[str, str]:
    """The environment of a part.

    Args:
        nccl: An NCCL library to load in place of torch's, for ranks that talk over it.
        site: A folder of packages brought along.
        scratch: Where a packed library is unpacked.

    Raises:
        ValueError: The library is not there, or not packed as it should be.
    """
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    paths = [str(ROOT), *([str(site)] if site else []), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env.setdefault("MKL_CBWR", "AUTO,STRICT")  # else a CPU's products may not repeat themselves
    for name, value in NCCL_SETTINGS.items():
        env.setdefault(name, value)
    if nccl is not None:
        before = [env["LD_PRELOAD"]] if env.get("LD_PRELOAD") else []
        env["LD_PRELOAD"] = ":".join([str(unpacked(nccl, scratch)), *before])
    return env


def carried() -> Path | None:
    """An NCCL library in ``.nccl`` of the repository, if one was brought along."""
    return next((path for path in CARRIED if path.exists()), None)


def unpacked(library: Path, scratch: Path) -> Path:
    """The library itself, unpacked first if its name ends in ``.xz``.

    Raises:
        ValueError: It is not there, or is no such file.
    """
    if not library.is_file():
        raise ValueError(f"--nccl {library}: there is no such file")
    if library.suffix != ".xz":
        return library.resolve()
    target = scratch / library.stem
    if not target.exists():
        try:
            target.write_bytes(lzma.decompress(library.read_bytes()))
        except lzma.LZMAError as error:
            raise ValueError(
                f"--nccl {library}: not an .xz file ({error}): make it anew with bench.gpu.pack_nccl"
            ) from error
    return target


def install(wheels: Path, scratch: Path) -> Path:
    """Puts wheels that were brought along into a folder, without asking any network.

    Raises:
        ValueError: There are none, or pip refuses them.
    """
    files = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if not files:
        raise ValueError(f"--wheels {wheels}: there are no .whl files")
    site = scratch / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--target", str(site), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip did not install the wheels of {wheels}:\n{done.stderr.strip()}")
    return site


if __name__ == "__main__":
    print(json.dumps(look()))
