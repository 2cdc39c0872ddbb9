"""Every method over links as slow, beside this machine's compute, as real links are beside real cards.

python -m bench.links --shape flux --link pcie

The bandwidth follows from rho, the time that the traffic of one Ulysses layer takes over the time that the layer's
compute takes: first for the real model on the real card, then for the narrow model at the rate measured here. Beside
each measured time stands what the planner predicts from that rate.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from bench.contenders import BESIDE, PLAIN, Contender, as_options, known
from bench.loopback import show
from bench.network import Network
from bench.predicted import Forecast, forecast, profile_of, workload_of
from bench.rounds import bound, keep_freed_memory, load, rows_of, save, take_turns, with_earlier
from bench.shapes import SHAPES, STEPS
from tests.support.ranks import Place

FLOAT32, BFLOAT16 = 4, 2  # bytes
PORT = 29577
NARROW = {"flux": "flux-wide", "pixart": "pixart-guided"}
DEEP = {"flux": "flux-deep", "pixart": "pixart-deep"}


@dataclass(frozen=True)
class Card:
    """A real model's shape, the rate a card computes it at, and the link between the cards.

    Attributes:
        tokens: Image and text tokens.
        width: Channels of a token.
        flops: Operations a second that the card really does.
        bandwidth: Bytes a second of the link, each way.
        latency: Seconds from card to card.
        ranks: Cards.
    """

    tokens: int
    width: int
    flops: float
    bandwidth: float
    latency: float
    ranks: int

    @property
    def layer_seconds(self) -> float:
        """Compute of one layer on one card: twelve square matrices of the width, and attention."""
        return (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width) / self.flops

    @property
    def rho(self) -> float:
        """Traffic of one Ulysses layer over its compute, both shared by the ranks."""
        sent = ulysses_bytes(self.tokens, self.width, self.ranks, BFLOAT16)
        return sent / self.bandwidth / (self.layer_seconds / self.ranks)


# L40S: about 90 TFLOP/s of bf16 in such models; PCIe 4.0 ×16 between cards of one host, 12-25 GB/s in practice.
# A100: about 180 TFLOP/s; NVLink 3, 300 GB/s each way. 25 GbE: 3.1 GB/s less 6 % of headers, 30 µs.
CARDS = {
    ("flux", "pcie"): Card(4608, 3072, 90e12, 18e9, 10e-6, 8),
    ("flux", "nvlink"): Card(4608, 3072, 180e12, 270e9, 5e-6, 8),
    ("flux", "25gbe"): Card(4608, 3072, 90e12, 2.9e9, 30e-6, 2),
    ("pixart", "pcie"): Card(4096, 1152, 90e12, 18e9, 10e-6, 8),
    ("pixart", "nvlink"): Card(4096, 1152, 180e12, 270e9, 5e-6, 8),
    ("pixart", "25gbe"): Card(4096, 1152, 90e12, 2.9e9, 30e-6, 2),
}


def ulysses_bytes(tokens: int, width: int, ranks: int, itemsize: int) -> float:
    """What a rank sends in one layer under Ulysses (arXiv 2309.14509, section 3)."""
    return 4 * tokens * width / ranks * (ranks - 1) / ranks * itemsize


def main(
    shape: Annotated[str, typer.Option(help="flux or pixart.")] = "flux",
    link: Annotated[str, typer.Option(help="pcie, nvlink or 25gbe.")] = "pcie",
    method: Annotated[list[str] | None, typer.Option(help="A contender; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
    deep: Annotated[bool, typer.Option("--deep", help="Twice as many blocks.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the earlier rows of contenders not asked for.")] = False,
) -> None:
    """Measures over shaped links between two hosts of one thread; needs root."""
    if (shape, link) not in CARDS:
        raise typer.BadParameter(f"{shape} over {link}: use one of {', '.join(' '.join(pair) for pair in CARDS)}")
    card, ranks, narrow = CARDS[shape, link], 2, (DEEP if deep else NARROW)[shape]
    here = SHAPES[narrow]
    layer = measured_layer_seconds(narrow)
    tokens = here.image + here.text
    sent = here.batch * ulysses_bytes(tokens, here.width, ranks, FLOAT32)
    bandwidth = sent / (card.rho * layer / ranks)
    latency = card.latency * layer / card.layer_seconds
    console = Console()
    console.print(
        f"real: a layer {card.layer_seconds * 1e3:.1f} ms on one card, rho {card.rho:.3f} on {card.ranks}\n"
        f"here: a layer {layer * 1e3:.1f} ms on one core, {sent / 1e6:.2f} MB of Ulysses' traffic, so "
        f"{bandwidth * 8 / 1e6:.0f} Mbit/s and {latency * 1e6:.0f} µs"
    )
    workload = workload_of(narrow, steps)
    said = forecast(workload, profile_of(workload, layer, bandwidth, latency, ranks), ranks)
    names = list(dict.fromkeys([PLAIN, BESIDE, *known(method or list(said.seconds))]))  # each once
    with tempfile.TemporaryDirectory() as folder, Network(ranks, bandwidth * 8, latency) as network:
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps({"shape": narrow, "names": names, "rounds": rounds, "steps": steps, "ranks": ranks}))
        command = [sys.executable, "-m", "bench.links", str(spec), network.address(0)]
        processes = [network.start(rank, [*command, str(rank)]) for rank in range(ranks)]
        if latency and not network.latency:
            console.print("this kernel cannot delay packets (no netem): the links are slow but not late")
        if any(process.wait() for process in processes):
            raise RuntimeError("a rank failed: see above")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    rows, limit = rows_of(found), bound(steps, ranks)
    show(f"{shape} over {link}, rho {card.rho:.2f}, {steps} steps", rows, limit)
    console.print(told(said))
    figures = {
        "shape": shape, "link": link, "card": asdict(card), "rho": card.rho, "layer_seconds": layer, "steps": steps,
        "bandwidth": bandwidth, "latency": network.latency, "bound": limit, "choice": said.choice,
        "rows": [{**row.as_dict(), "predicted": said.of(row.name, row.patches)} for row in rows],
    }  # fmt: skip
    name = f"links-{shape}-{link}{'-deep' if deep else ''}"
    how = f"{' --deep' if deep else ''} --rounds {rounds}{as_options(method)}"
    asked = f"python -m bench.links --shape {shape} --link {link}{how}"
    if keep:
        asked, figures = with_earlier(load(name), asked + " --keep", figures)
    save(name, asked, figures)


def told(said: Forecast) -> str:
    """The planner's predictions in a line."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in said.seconds.items())
    return f"predicted: {seconds}; the planner takes {said.choice}"


def measured_layer_seconds(shape: str) -> float:
    """Seconds of one layer of one step on one core of this machine, for all branches of guidance."""
    torch.set_num_threads(1)
    keep_freed_memory()
    contender = Contender(PLAIN, shape, Place(0, 1, None), steps=2)
    seconds = []
    for _ in range(3):
        handles, spent = _stopwatch(contender.pipe.transformer)
        contender.run()
        for handle in handles:
            handle.remove()
        seconds.append(sum(spent) / len(spent))
    return median(seconds) / SHAPES[shape].blocks


def _stopwatch(model: torch.nn.Module) -> tuple[list[torch.utils.hooks.RemovableHandle], list[float]]:
    started: list[float] = []
    spent: list[float] = []
    before = model.register_forward_pre_hook(lambda *_: started.append(perf_counter()))
    after = model.register_forward_hook(lambda *_: spent.append(perf_counter() - started[-1]))
    return [before, after], spent


def one_rank(spec: Path, master: str, rank: int) -> None:
    """What runs on each host."""
    asked = json.loads(spec.read_text())
    store = dist.TCPStore(master, PORT, is_master=rank == 0, wait_for_workers=False)
    found = take_turns(
        Place(rank, asked["ranks"], store), asked["shape"], asked["names"], asked["rounds"], asked["steps"]
    )
    (spec.parent / f"{rank}.json").write_text(json.dumps(found))
    store.set(f"done/{rank}", "yes")
    if rank == 0:  # whose process is the store
        store.wait([f"done/{other}" for other in range(asked["ranks"])])


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].endswith("spec.json"):
        one_rank(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        typer.run(main)
