"""Rows that stand for all."""

from __future__ import annotations

import itertools

import pytest

from tests.support.some import covering

pytest_plugins = ["pytester"]
TABLE = """
import pytest

@pytest.mark.some
@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_layouts(name, layout): ...

@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_streams(name): ...

@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_from_disk(name): ...

@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_all(name): ...

@pytest.mark.extra
def test_dear(): ...
"""


def test_every_value_is_in_a_row_and_few_rows_are_taken() -> None:
    rows = [{f"a{one}", f"b{two}"} for one, two in itertools.product(range(9), range(8))]
    taken = covering(rows)
    assert set().union(*(rows[index] for index in taken)) == set().union(*rows)
    assert len(taken) == 9


@pytest.mark.parametrize(
    ("given", "passed", "left"),
    [([], 9, 7), (["--every"], 16, 0), (["-k", "streams"], 3, 0), (["test_it.py::test_layouts"], 6, 0)],
    ids=str,
)
def test_rows_run_where_they_are_asked_for(pytester: pytest.Pytester, given: list[str], passed: int, left: int) -> None:
    pytester.makeconftest(
        "import pytest\n"
        "from tests.support.some import MARKS, leave_some\n"
        "def pytest_addoption(parser): parser.addoption('--every', action='store_true')\n"
        "def pytest_configure(config): [config.addinivalue_line('markers', mark) for mark in MARKS]\n"
        "def pytest_collection_modifyitems(config, items): leave_some(config, items)\n"
    )
    pytester.makepyfile(test_it=TABLE)
    outcome = pytester.runpytest(*given)
    outcome.assert_outcomes(passed=passed, deselected=left + (13 if given[:1] == ["-k"] else 0))
