"""Ulysses' exchange over links of two speeds, flat and on two levels: seconds, and bytes over each kind of link.

python -m bench.two_levels

Ranks are processes. Those of a domain share a network namespace, whose loopback device tc shapes; the namespaces are
joined by links that tc makes eight times slower, and that the ranks of a domain share (``bench/two_levels_links.py``).
Real are patchpipe's attention with its exchange, its hooks for values that go first, gloo and TCP. What a card would
compute (projections, norms, attention, the rest of a block) sleeps instead, so that eight ranks fit on two cores.

Contenders take turns in rounds. What each takes is compared with the flat exchange of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from bench.rounds import load, meet, save
from bench.two_levels_links import DEEP, SHALLOW, Carried, Domains, carried, enter
from patchpipe import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.models.latent import Raster
from patchpipe.parallel.lossy.ulysses import ChangedLayer, ChangedUlysses, Moment
from patchpipe.parallel.sharing import ulysses_line
from patchpipe.parallel.ulysses import Ulysses
from patchpipe.stage.attending import Attending, Sharing
from patchpipe.stage.attention import attend_through, override
from patchpipe.stage.keys.early import Early, parts_of
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Rows
from tests.support.ranks import Place, run_ranks

HEADS, CHANNELS = 24, 64
SLOW, RATIO = 30e6, 8  # bits a second, and how many times faster links inside a domain are
MTU = 1500
LAYERS = 1  # a round: each contender runs so many layers, one after the other
SHARE_BEFORE, SHARE_NORMS = 0.2, 0.05  # of a layer's computing: its three projections; norms and rotations


@dataclass(frozen=True)
class Contender:
    """One way to exchange.

    Attributes:
        name: For people.
        levels: Whether on two levels.
        turns: In how many turns heads go.
        first: Whether values go first.
        share: Of the tokens, those that are exchanged, if not all are.
    """

    name: str
    levels: bool = False
    turns: int = 1
    first: bool = False
    share: float | None = None


FLAT = Contender("flat")
EXCHANGES = (FLAT, Contender("two levels", levels=True))
LAYER_WAYS = (
    FLAT,
    Contender("flat, values first", first=True),
    Contender("flat, in turns, values first", turns=3, first=True),
    Contender("flat, half of the tokens", share=0.5),
    Contender("two levels", levels=True),
    Contender("two levels, in turns", levels=True, turns=3),
    Contender("two levels, in turns, values first", levels=True, turns=3, first=True),
)


@dataclass(frozen=True)
class Load:
    """What a layer works on, and how long a card would compute.

    Attributes:
        tokens: Rows of the sequence.
        attention: Seconds of a rank's attention.
        other: Seconds of the rest of its layer.
    """

    tokens: int
    attention: float = 0.0
    other: float = 0.0

    @property
    def itself(self) -> float:
        """Bytes of one activation of all ranks, ``tokens · width``, in float32."""
        return self.tokens * HEADS * CHANNELS * 4


class Layer(nn.Module):
    """A self-attention layer, in the order in which diffusers' processors compute, that sleeps where a card works.

    Args:
        load: How long.
        ranks: Ranks that share its heads.
    """

    heads = HEADS

    def __init__(self, load: Load, ranks: int) -> None:
        super().__init__()
        self.load, self.ranks = load, ranks
        self.to_q, self.to_k, self.to_v = (_Projection(load.other * SHARE_BEFORE / 3) for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[1, rows, width]`` to what attention makes of them."""
        parts = [linear(rows).unflatten(-1, (HEADS, -1)) for linear in (self.to_q, self.to_k, self.to_v)]
        time.sleep(self.load.other * SHARE_NORMS)
        made = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        time.sleep(self.load.other * (1 - SHARE_BEFORE - SHARE_NORMS))
        return made.transpose(1, 2).flatten(2)


class _Projection(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, rows: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return rows + 1


class _Asleep:
    """Stands in for torch's attention kernel: takes its time, by heads, and gives back its values."""

    def __init__(self, load: Load, ranks: int) -> None:
        self.each = load.attention / (HEADS / ranks)

    def watching(self, _: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return self.kernel

    def kernel(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        time.sleep(self.each * query.shape[1] * query.shape[2] / key.shape[2])
        return value + query + key if query.shape == key.shape else query + 1


class Runner:
    """One contender on one rank.

    Args:
        contender: The contender.
        group: The ranks, with lines on one level or on two.
        load: What a layer works on.
    """

    def __init__(self, contender: Contender, group: Group, load: Load) -> None:
        self.contender, self.group, self.load = contender, group, load
        ranks = group.world_size
        raster = Raster(count=load.tokens, tokens=1, units=1)
        cut = Cut.of(raster, ParallelConfig(ulysses=ranks))
        pieces = cut.split(cut.whole, ranks)
        self.ulysses = Ulysses(ulysses_line(group), cut.whole, pieces, turns=contender.turns)
        rows = Rows.of(("image",), {"image": load.tokens}, raster)
        kernels: Any = _Asleep(load, ranks)
        self.own = pieces[group.rank]
        self.layer = Layer(load, ranks)
        early = Early(self.layer, parts_of(self.layer, ("image",))) if contender.first else None
        if early is not None:
            early.hook(override)
        self.kept: list[ChangedLayer] = []
        self.steps = 0

        def attending() -> Attending:
            return Attending(self.own, None, self._sharing(cut, pieces), rows, kernels=kernels)

        attend_through(self.layer, attending, early=early)
        torch.manual_seed(0)
        self.given = torch.randn(1, load.tokens, HEADS * CHANNELS)[:, self.own.tokens[0] : self.own.tokens[1]]

    def _sharing(self, cut: Cut, pieces: tuple[Patch, ...]) -> Sharing:
        """That of the next step; a share stays as it is on average over a request."""
        share, self.steps = self.contender.share, self.steps + 1
        if share is None:
            return self.ulysses
        moment = Moment(1 / self.steps, share if self.steps > 1 else None, forecast=True)
        return ChangedUlysses(self.ulysses.exchange, cut.whole, pieces, self.kept, moment)

    def run(self) -> Tensor:
        """So many layers, one after the other."""
        rows = self.given
        for _ in range(LAYERS):
            rows = self.layer(rows)
        return rows


def on_rank(
    place: Place, names: list[str], inner: int, ways: tuple[Contender, ...], load: Load, rounds: int
) -> list[list[dict[str, Any]]]:
    """Seconds, and bytes of this rank's domain, of every contender in every round."""
    torch.set_num_threads(1)
    enter(names[place.rank // inner])
    flat = ParallelConfig(ulysses=place.world_size, timeout=120)
    groups = {
        False: place.join(flat),
        True: place.join(ParallelConfig(ulysses=place.world_size, ulysses_inner=inner, timeout=120)),
    }
    runners = [Runner(way, groups[way.levels], load) for way in ways]
    right = runners[0].run()
    for runner in runners[1:]:  # changed tokens need a first step, which sends all
        if runner.contender.share is not None:
            runner.run()
    found: list[list[dict[str, Any]]] = []
    for turn in range(rounds):
        found.append([])
        for way, runner in zip(ways, runners, strict=True):
            meet(place, f"{turn}/{way.name}")
            time.sleep(0.05)  # all have left the meeting, and the links are at rest
            before, sent, began = carried(), _sent(runner.group), time.perf_counter()
            made = runner.run()
            ended = time.perf_counter()
            meet(place, f"{turn}/{way.name}/done")
            if way.share is None and not torch.equal(made, right):
                raise AssertionError(f"{way.name} does not give what {ways[0].name} gives")
            found[-1].append({
                "began": began, "ended": ended, "carried": asdict(carried().since(before)),
                "sent": {name: size - sent[name] for name, size in _sent(runner.group).items()},
            })  # fmt: skip
    return found


def _sent(group: Group) -> dict[str, int]:
    """What this rank gave its lines to send, by line."""
    return {name: line.sent_bytes for name, line in group.lines.items()}


@dataclass(frozen=True)
class Row:
    """One contender's figures, a layer.

    Attributes:
        name: Its name.
        seconds: Median.
        gain: Median over rounds of how many times faster than the first contender it was.
        worst: The least of these.
        best: The largest.
        fast: Bytes inside all domains, as the kernel counts them.
        slow: Bytes between them.
        packets: Packets between them.
    """

    name: str
    seconds: float
    gain: float
    worst: float
    best: float
    fast: float
    slow: float
    packets: float


def rows_of(ways: tuple[Contender, ...], ranks: list[Any], inner: int) -> list[Row]:
    """What the ranks measured, put together."""
    rows = []
    base = [_seconds(ranks, turn, 0) for turn in range(len(ranks[0]))]
    for index, way in enumerate(ways):
        taken = [_seconds(ranks, turn, index) for turn in range(len(base))]
        gains = sorted(one / other for one, other in zip(base, taken, strict=True))
        seen = [_carried(ranks, turn, index, inner) for turn in range(len(base))]
        each = [median(getattr(one, name) for one in seen) / LAYERS for name in ("fast", "slow", "slow_packets")]
        rows.append(Row(way.name, median(taken) / LAYERS, median(gains), gains[0], gains[-1], *each))
    return rows


def _seconds(ranks: list[Any], turn: int, index: int) -> float:
    figures = [rank[turn][index] for rank in ranks]
    return max(one["ended"] for one in figures) - min(one["began"] for one in figures)


def _carried(ranks: list[Any], turn: int, index: int, inner: int) -> Carried:
    """Of all domains: one member of each tells what its devices sent."""
    found = [rank[turn][index]["carried"] for rank in ranks[::inner]]
    return Carried(*(sum(one[name] for one in found) for name in ("fast", "slow", "slow_packets")))


def formula(load: Load, ranks: int, inner: int, levels: bool) -> tuple[float, float]:
    """Bytes of a layer inside all domains and between them: queries, keys, values and the result.

    Of what a rank gives, ``(G - I) / G`` is for other domains, whichever way it goes. Inside, a flat exchange sends
    ``(I - 1) / G`` of it, one on two levels ``(I - 1) / I``: what comes from elsewhere is handed on.
    """
    whole = 4 * load.itself
    inside = (inner - 1) / (inner if levels else ranks)
    return whole * inside, whole * (ranks - inner) / ranks


def messages(ranks: int, inner: int, levels: bool) -> tuple[int, int]:
    """Messages of one exchange inside all domains, and between them."""
    domains = ranks // inner
    across = ranks * (domains - 1) * (1 if levels else inner)
    return ranks * (inner - 1), across


def main(
    rounds: Annotated[int, typer.Option(help="Rounds in which all contenders take turns.")] = 7,
    only: Annotated[str, typer.Option(help="Only cases whose name begins so.")] = "",
    write: Annotated[bool, typer.Option(help="Write the figures to bench/results.")] = True,
) -> None:
    """Measures every case; needs root."""
    console, found = Console(), dict(load("two-levels") or {}).get("cases", {})
    for case in cases():
        if not case.name.startswith(only):
            continue
        rows = case.measure(rounds)
        found[case.name] = {**case.about(), "rounds": rounds, "rows": [asdict(row) for row in rows]}
        console.print(case.table(rows))
    if write:
        save("two-levels", f"python -m bench.two_levels --rounds {rounds}", {"cases": found})


@dataclass(frozen=True)
class Case:
    """Domains, links, and what is exchanged over them.

    Attributes:
        name: Its name.
        ranks: All of them.
        inner: Those of a domain.
        load: What a layer works on.
        ways: The contenders.
        queue: See ``Domains``.
        slow: Bits a second of slow links.
        packet: See ``Domains``.
    """

    name: str
    ranks: int
    inner: int
    load: Load
    ways: tuple[Contender, ...]
    queue: str = DEEP
    slow: float = SLOW
    packet: int = MTU

    def measure(self, rounds: int) -> list[Row]:
        """Runs it."""
        domains = self.ranks // self.inner
        with Domains(domains, self.slow, RATIO * self.slow, self.queue, self.packet) as network:
            arguments = (network.names(), self.inner, self.ways, self.load, rounds)
            return rows_of(self.ways, run_ranks(self.ranks, on_rank, *arguments, timeout=900), self.inner)

    def about(self) -> dict[str, Any]:
        """What it is, as data."""
        of = {str(levels): formula(self.load, self.ranks, self.inner, levels) for levels in (False, True)}
        counts = {str(levels): messages(self.ranks, self.inner, levels) for levels in (False, True)}
        return {
            "ranks": self.ranks, "inner": self.inner, "load": asdict(self.load), "queue": self.queue,
            "slow": self.slow, "ratio": RATIO, "formula": of, "messages": counts,
        }  # fmt: skip

    def table(self, rows: list[Row]) -> Table:
        """For people."""
        title = f"{self.name}: {self.ranks} ranks in domains of {self.inner}, {self.slow / 1e6:.0f} Mbit/s between"
        table = Table("", "ms a layer", "× flat", "least…most", "MB inside", "MB between", "packets", title=title)
        for row in rows:
            table.add_row(
                row.name, f"{row.seconds * 1e3:.0f}", f"{row.gain:.2f}", f"{row.worst:.2f}…{row.best:.2f}",
                f"{row.fast / 1e6:.2f}", f"{row.slow / 1e6:.2f}", f"{row.packets:.0f}",
            )  # fmt: skip
        return table


def cases() -> Iterator[Case]:
    """All of them: the exchange alone, large and small and over links that drop packets; and layers that compute."""
    for ranks, inner in ((4, 2), (8, 2), (8, 4)):
        where = f"{ranks} in {inner}s"
        yield Case(f"exchange {where}", ranks, inner, Load(768), EXCHANGES)
        yield Case(f"small {where}", ranks, inner, Load(48), EXCHANGES)
        yield Case(f"loss {where}", ranks, inner, Load(768), EXCHANGES, queue=SHALLOW)
    for ranks, inner in ((4, 2), (8, 4)):
        crossing = formula(Load(768), ranks, inner, levels=True)[1] / (ranks // inner) * 8 / SLOW
        for share, title in ((1.0, "balanced"), (0.25, "slow")):
            load_of = Load(768, attention=crossing * share, other=crossing * share)
            yield Case(f"layer {title} {ranks} in {inner}s", ranks, inner, load_of, LAYER_WAYS)


if __name__ == "__main__":
    typer.run(main)
