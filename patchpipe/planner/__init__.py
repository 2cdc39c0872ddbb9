"""The planner: predicts what a layout costs on a machine, and finds the best one."""

from __future__ import annotations

from patchpipe.planner.cost import Tokens, block_parts, block_seconds
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.cards import device_named
from patchpipe.planner.machine.devices import Device
from patchpipe.planner.machine.links import Line, Link, link_named
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.machine.system import PATCHPIPE, XDIT, System
from patchpipe.planner.predict import Prediction, calibrated, predict
from patchpipe.planner.schedule import Schedule
from patchpipe.planner.work.presets import preset_named
from patchpipe.planner.work.workload import Block, Workload

__all__ = [
    "PATCHPIPE",
    "XDIT",
    "Block",
    "Device",
    "Layout",
    "Line",
    "Link",
    "Prediction",
    "Profile",
    "Schedule",
    "System",
    "Tokens",
    "Workload",
    "block_parts",
    "block_seconds",
    "calibrated",
    "device_named",
    "link_named",
    "predict",
    "preset_named",
]
