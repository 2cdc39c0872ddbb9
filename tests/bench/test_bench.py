"""The benches' arithmetic, and the slow links themselves where this machine may make them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest

from bench import emulated_device, together
from bench.contenders import known
from bench.emulated import Run, extrapolated, merged, summary
from bench.emulated_device import Costs, EmulatedDevice
from bench.emulated_links import exchange_rate, shares_of
from bench.emulated_models import MODELS
from bench.emulated_report import fastest
from bench.links import CARDS, ulysses_bytes
from bench.network import Network
from bench.report import compiled, table
from bench.rounds import bound, rows_of, with_earlier
from patchpipe import ParallelConfig
from patchpipe.planner import Line, Profile, block_seconds, link_named, predict


def test_rho_is_that_of_the_real_cards() -> None:
    assert 0.25 < CARDS["flux", "pcie"].rho < 0.6
    assert 0.5 < CARDS["pixart", "pcie"].rho < 1.2
    assert CARDS["flux", "nvlink"].rho < CARDS["flux", "pcie"].rho / 5
    assert ulysses_bytes(tokens=100, width=10, ranks=2, itemsize=4) == 4 * (100 * 10 / 2) / 2 * 4


def test_ratios_are_taken_within_a_round() -> None:
    def entry(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "waited": 0.5, "sent_bytes": 8, "patches": 3}

    ranks = [
        {"plain": [entry(10), entry(20), entry(12)], "pipefusion": [entry(5), entry(16), entry(6)]},
        {"plain": [], "pipefusion": [entry(5), entry(16), entry(6)]},
    ]
    _, ours = rows_of(ranks)
    assert ours.ratios == [2.0, 1.25, 2.0]
    assert ours.speedup == 2.0
    assert ours.waited == [0.5, 0.5]
    assert bound(steps=20, ranks=2) == pytest.approx(1.905, abs=1e-3)
    machine = {"cpu": "a CPU", "torch": "2", "cores": 2, "python": "3"}
    figures = {"command": "x", "machine": machine, "bound": 2.0, "steps": 20, "rows": [ours.as_dict()]}
    assert "| pipefusion | 3 | 6.0 | 2.00× (1.25-2.00) | 100.0% | 0.5 s / 0.5 s | 0 MB / 0 MB |" in table(figures)


def test_what_busy_ranks_cost_each_other_is_told() -> None:
    figures = [{"plain": [{"seconds": 10.0, "waited": 0, "sent_bytes": 0, "patches": 1}]} for _ in range(2)]
    for name, seconds in (("plain-beside", 12.5), ("pipefusion", 6.25)):
        for rank in figures:
            rank[name] = [{"seconds": seconds, "waited": 0, "sent_bytes": 0, "patches": 1}]
    rows = [row.as_dict() for row in rows_of(figures)]
    about = {"machine": {"cpu": "a core", "torch": "2"}, "command": "measure", "steps": 20, "bound": 2.0, "rows": rows}
    assert "at 0.80× the speed of one alone. Corrected for that, PipeFusion reaches 100% of its bound." in table(about)


def test_compiled_blocks_are_compared_with_themselves() -> None:
    row = {"patches": 3, "speedup": 1.5, "ratios": [1.5]}
    rows = [
        {**row, "name": "pipefusion:3", "seconds": [6.0]},
        {**row, "name": "pipefusion:3+compiled", "seconds": [4.0]},
    ]
    layout = {"ranks": 2, "bound": 1.9, "rows": rows}
    text = compiled({"machine": {"cpu": "a core"}, "command": "measure", "steps": 8, "layouts": [layout]})
    assert "| 2 | pipefusion:3+compiled | 3 | 4.0 | 1.50× (1.50-1.50) | 1.50× |" in text


def test_requests_together_are_compared_with_those_in_turn_of_the_same_round() -> None:
    def entries(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": one, "waited": 0.25} for one in seconds]

    rank = {together.SERIAL: entries(10, 24, 9), together.TOGETHER: entries(5, 16, 6)}
    row = together.row_of("all", [rank, rank], requests=2, steps=8)
    assert row.ratios == [2.0, 1.5, 1.5]
    assert (row.ideal, row.waited[together.TOGETHER]) == (2.0, [0.25, 0.25])
    assert together.ideal(1, requests=2, ranks=2, steps=8) == pytest.approx((1 + 3.5) / (0.5 + 3.5))
    assert together.ideal(1, requests=4, ranks=2, steps=8) == together.ideal(1, requests=2, ranks=2, steps=8)


def test_unknown_contenders_are_refused() -> None:
    with pytest.raises(ValueError, match="'warp' is no contender: use plain"):
        known(["plain", "warp"])
    assert known(["pipefusion:4"]) == ["pipefusion:4"]


def test_a_card_starts_when_it_is_free_and_the_data_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(emulated_device.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(emulated_device.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    card = EmulatedDevice(dilation=10)
    card.compute(0.1)
    assert now[0] == pytest.approx(11)
    now[0] += 0.25  # the host's own code, while the card has been told nothing
    card.arrived(waited=0.0)  # its data were there
    card.compute(0.1)
    assert now[0] == pytest.approx(12)  # hidden: the card went on
    now[0] += 0.5
    card.arrived(waited=0.5)  # until now the card had nothing to do
    card.compute(0.1)
    assert now[0] == pytest.approx(13.5)
    assert card.worked == pytest.approx(3)


def test_emulated_blocks_take_what_the_planner_says() -> None:
    """Whole, shared by heads, or in parts of the keys, a block's attention and the rest add up to its seconds."""
    model = MODELS["flux"]
    workload, profile = model.workload(1024), model.calibrated(1024, Profile.named("l40", "pcie4"))
    assert predict(workload, ParallelConfig(), profile).seconds == pytest.approx(18.36)
    costs, block, rows = Costs(workload, profile), workload.blocks[0], workload.image + workload.text
    whole = costs.attention(block, 1, 1.0, rows, rows)
    seconds = block_seconds(block, workload.image, workload.image, profile.device, text=workload.text)
    assert whole + costs.other(block, 1, workload.image, workload.text) == pytest.approx(profile.slowdown * seconds)
    assert 4 * costs.attention(block, 1, 1.0, rows, rows // 4) == pytest.approx(whole, rel=1e-3)
    assert whole < 8 * costs.attention(block, 1, 1 / 8, rows, rows) < 1.2 * whole  # tiles that lie idle


def test_emulated_links_are_as_fast_as_the_layout_finds_them() -> None:
    link = link_named("pcie4")
    assert shares_of(link, ParallelConfig(pipefusion=8), 3)[0].rate == link.bandwidth
    near, far = shares_of(link, ParallelConfig(ulysses=4, ring=2), 5)
    assert near.peers == (4, 6, 7)
    assert near.rate == pytest.approx(link.bandwidth * (2 / 4) ** link.contention)
    assert far.rate == pytest.approx(link.trunk / 4)
    calm = replace(link, contention=0.0)
    assert exchange_rate(calm, Line(4)) == link.bandwidth
    # of eight, four send four sevenths of theirs over the trunk
    assert exchange_rate(calm, Line(8)) == pytest.approx(link.trunk / 4 * 7 / 4)


def test_figures_are_the_cards_own() -> None:
    run = Run("pipefusion2", "pixart", 1024, {"pipefusion": 2, "patches": 4}, dilation=10, steps=4, predicted=1.0)
    marks = [(1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (4.0, 0.04, 2.0), (6.0, 0.08, 3.9), (8.0, 0.12, 5.8)]
    rank = {"ended": 9.0, "marks": marks, "used": 4.0, "patches": 4, "sent": 8}
    row = summary(run, [rank, rank], None)
    assert row["period"] == pytest.approx(0.2)
    assert row["seconds"] == pytest.approx(extrapolated(8.0, 2.0, done=4, wanted=20) / 10)
    assert row["host"] == pytest.approx([0.01, 0.01])
    assert row["card"] == pytest.approx([0.95, 0.95])
    assert row["cores"] == pytest.approx(1.0)


def test_rows_measured_anew_replace_the_old_ones() -> None:
    old = [{"name": name, "patches": 1, "contended": True, "seconds": 1} for name in ("ring8", "tensor8")]
    new = [{**old[1], "seconds": 2}, {**old[1], "contended": False, "seconds": 3}]
    assert [row["seconds"] for row in merged(old, new)] == [1, 2, 3]


def test_rows_that_a_run_did_not_measure_can_be_kept() -> None:
    def row(name: str, patches: int = 1) -> dict[str, Any]:
        return {"name": name, "patches": patches}

    old = {"command": "one", "rows": [row("plain"), row("ring"), row("pipefusion:4", 4), row("pipefusion:6", 6)]}
    new = {"rho": 0.4, "rows": [row("plain"), row("pipefusion", 4)]}
    command, figures = with_earlier(old, "two", new)
    assert command == "one\ntwo"
    assert [one["name"] for one in figures["rows"]] == ["plain", "pipefusion", "ring", "pipefusion:6"]
    assert with_earlier(None, "two", new) == ("two", new)


def test_a_summary_compares_with_the_best_there_is() -> None:
    def row(name: str, seconds: float, contended: bool = True) -> dict[str, Any]:
        return {"name": name, "seconds": seconds, "contended": contended}

    rows = [row("ulysses8", 9), row("ulysses8", 3, False), row("ring8", 5), row("pipefusion8", 2)]
    assert fastest(rows, "ulysses", "ring")["seconds"] == 5
    assert fastest(rows, "ulysses", "ring", contended=False)["seconds"] == 3


PROBE = "import socket,sys; s=socket.create_connection((sys.argv[1], 9), timeout=2)"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="network namespaces need root and iproute2")
def test_hosts_have_links_of_their_own_and_leave_nothing_behind() -> None:
    try:
        with Network(2, bandwidth=50e6) as network:
            probe = network.start(0, [sys.executable, "-c", PROBE, network.address(1)])
            assert probe.wait(timeout=20) == 1  # refused by a host that is there, at once
    except RuntimeError as error:
        pytest.skip(f"no namespaces here: {error}")
    assert not os.path.exists(f"/sys/class/net/{Network.prefix}bridge")
