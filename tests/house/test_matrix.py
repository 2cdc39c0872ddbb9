"""The matrix of models and features says what the tests run and what the engine refuses."""

from __future__ import annotations

import json
import re

import pytest

from patchpipe import ParallelConfig
from patchpipe.cli import app
from patchpipe.models import PLANS, plan_for
from patchpipe.models.matrix import COLUMNS, check_tested, matrix
from patchpipe.parallel.refusals import check_special
from tests.support.evidence import evidence
from tools.documents import replaced
from tools.matrix import DATA, PAGE, made, table, written


def test_it_is_the_one_that_tests_and_engine_give() -> None:
    """Else: ``python -m tools.matrix --write``."""
    found = made()
    assert DATA.read_text(encoding="utf-8") == written(found)
    page = PAGE.read_text(encoding="utf-8")
    assert page == replaced(page, "matrix", table(found))


def test_every_class_has_every_column_and_every_test_its_names() -> None:
    cells = {model: row["cells"] for model, row in matrix()["classes"].items()}
    assert set(cells) == {plan.model for plan in PLANS}
    assert all(set(row) == set(COLUMNS) for row in cells.values())
    assert all(("tested" in cell) != ("refused" in cell) for row in cells.values() for cell in row.values())
    assert all(each.names and re.match(r"tests/\w+/test_", each.where) for each in evidence() if each.shows)


def test_what_no_test_runs_is_refused_and_unknown_classes_are_not() -> None:
    config = ParallelConfig(pipefusion=2, patches=2, forecast=True)
    check_special(plan_for("FluxTransformer2DModel"), config)
    with pytest.raises(ValueError, match=r"has not been tested with SanaTransformer2DModel .* use forecast=False"):
        check_special(plan_for("SanaTransformer2DModel"), config)
    check_tested("OneOfTheUsersOwn", "forecast", "forecast=True", "use forecast=False")


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == matrix()
    assert app(args=["models", "--matrix"]) == 0
    assert "DiTTransformer2DModel" in capsys.readouterr().out
