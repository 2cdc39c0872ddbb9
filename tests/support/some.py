"""Which rows of the tests' tables run: some that stand for all, or every one with ``--every``.

A table of families and layouts has a row for each pair, and most rows tell nothing that others do not: what is special
to a family is how its rows are cut, and what is special to a method is how it shares them. So a test marked ``some``
runs as few rows as show every value of every parameter once. Marked ``some(of=4, first=1)`` it runs every fourth row
from the second on: another test of the same table may then take those that it leaves out. A test that takes long and
tells little that others do not is marked ``extra``, and runs with ``--every`` alone. Tests that are named, with ``-k``
or as ``file::test``, run every row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

MARKS = (
    "some(of=None, first=0): rows that stand for all where --every is not given",
    "extra: runs with --every alone",
)


def leave_some(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the rows out that need not run."""
    if config.getoption("every") or config.getoption("keyword") or any("::" in arg for arg in config.args):
        return
    tables: defaultdict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("some") is not None:
            tables[str(item.path), item.originalname].append(item)
    gone: set[pytest.Item] = {item for item in items if item.get_closest_marker("extra") is not None}
    gone |= {item for rows in tables.values() for item in set(rows).difference(_chosen(rows))}
    config.hook.pytest_deselected(items=[item for item in items if item in gone])
    items[:] = [item for item in items if item not in gone]


def _chosen(rows: Sequence[pytest.Function]) -> list[pytest.Function]:
    mark = rows[0].get_closest_marker("some")
    assert mark is not None
    if mark.kwargs:
        chosen = list(rows[mark.kwargs.get("first", 0) :: mark.kwargs["of"]])
        if not chosen:
            raise pytest.UsageError(f"{rows[0].originalname}: some({mark.kwargs}) leaves no row; mark it extra")
        return chosen
    return [rows[index] for index in covering([_values(row) for row in rows])]


def covering(rows: Sequence[set[str]]) -> list[int]:
    """The fewest rows, or nearly, that have every value: always the one with most that no row before it had."""
    left, chosen = set().union(*rows), []
    while left:
        best = max(range(len(rows)), key=lambda index: len(rows[index] & left))
        chosen.append(best)
        left -= rows[best]
    return sorted(chosen)


def _values(row: pytest.Function) -> set[str]:
    return {f"{name}={value!r}" for name, value in row.callspec.params.items()}
