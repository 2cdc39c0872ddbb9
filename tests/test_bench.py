"""The benches' arithmetic, and the slow links themselves where this machine may make them."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from bench import together
from bench.contenders import known
from bench.links import CARDS, ulysses_bytes
from bench.network import Network
from bench.report import table
from bench.rounds import bound, rows_of


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
    assert "| pipefusion | 3 | 6.0 | 2.00× (1.25-2.00) | 100% | 0.5 s / 0.5 s | 0 MB / 0 MB |" in table(figures)


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


PROBE = "import socket,sys; s=socket.create_connection((sys.argv[1], 9), timeout=2)"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="network namespaces need root and iproute2")
def test_hosts_have_links_of_their_own_and_leave_nothing_behind() -> None:
    try:
        with Network(2, bandwidth=50e6) as network:
            probe = network.start(0, [sys.executable, "-c", PROBE, network.address(1)])
            assert probe.wait(timeout=20) == 1  # refused by a host that is there, at once
    except RuntimeError as error:
        pytest.skip(f"no namespaces here: {error}")
    assert not os.path.exists("/sys/class/net/ppbridge")
