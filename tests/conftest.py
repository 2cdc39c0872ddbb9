"""What holds for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

gc.disable()  # until all tests are imported: nothing of what is loaded goes away

# On CPUs not made by Intel, MKL's float32 products differ in the last bits with where a matrix lies in memory:
# there plain diffusers does not repeat itself either. Read at the first product, and by the processes of the ranks.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

from patchpipe.engine.processes import warm
from tests.support.some import MARKS, leave_some


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="run every test and every row of every table")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_some(config, items)


def pytest_collection_finish() -> None:
    freeze()
    gc.enable()


def freeze() -> None:
    """What is here by now is here to stay: the collector, and the search for pipelines, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def libraries_stay_loaded() -> Iterator[None]:
    """Engines of all tests fork their workers from one process."""
    with warm():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _name_no_test()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    _name_no_test()


def _name_no_test() -> None:
    """One process forks all workers while their environment stays the same: pytest puts each test's name into it."""
    os.environ["PYTEST_CURRENT_TEST"] = "a test"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, as the ranks have: another number of threads adds sums up in another order."""
    torch.set_num_threads(1)
    freeze()
