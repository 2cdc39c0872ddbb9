"""Part h: what a forecast of stale keys and values adds to a layer's store, in torch's operations and fused."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch

from bench.forecast import FLUX, Layer, Size
from bench.gpu.setting import Note, Setting
from patchpipe.kernels.passes import ALIKE, difference, passes_for
from patchpipe.kernels.trends import PLAIN, Passes
from patchpipe.stage.keys import forecast

TINY = Size(heads=2, text=8, side=8)
PATCHES, STEPS = 4, 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(setting: Setting, note: Note) -> None:
    """A row for each dtype: which passes run, how far they are from torch's, and the seconds they take."""
    device = torch.device(setting.places(1, own=True)[0])
    for dtype in DTYPES[:1] if setting.tiny else DTYPES:
        passes = passes_for(device, dtype)
        apart = difference(passes, device, dtype, channels=128)
        figures: dict[str, Any] = {"passes": passes.told, "difference": apart}
        for name, used in (("none", None), ("torch", PLAIN), ("fused", passes)):
            figures[f"{name}_milliseconds"] = _step(setting, device, dtype, used)
        fine = apart <= ALIKE and (setting.tiny or passes is not PLAIN)
        note(str(dtype).removeprefix("torch."), fine, figures)


def _step(setting: Setting, device: torch.device, dtype: torch.dtype, passes: Passes | None) -> dict[str, float]:
    """Of a layer's store in a steady step of all patches: until the host is done with it, and until the device is."""
    with mock.patch.object(forecast, "passes_for", return_value=passes), torch.no_grad():
        size = TINY if setting.tiny else FLUX
        layer = Layer(size, PATCHES, dtype, forecast=passes is not None, device=device)
    host, both = [], []
    for _ in range(2 if setting.tiny else STEPS):
        _wait(device)
        began = perf_counter()
        layer.step()
        host.append(1000 * (perf_counter() - began))
        _wait(device)
        both.append(1000 * (perf_counter() - began))
    return {"host": median(host), "device": median(both)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
