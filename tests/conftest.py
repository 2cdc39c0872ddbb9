"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread, as the ranks have: another number of threads adds sums up in another order."""
    torch.set_num_threads(1)
