"""The layout of an engine that was given none: chosen by its first worker, which has loaded the libraries anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchpipe.config import PLAIN, AutoLayout, ParallelConfig
from patchpipe.engine.crew import Crew
from patchpipe.engine.devices import available_cores, choose_devices, cuda_count
from patchpipe.engine.messages import Plan, Planned
from patchpipe.engine.processes import Worker
from patchpipe.engine.watch import Watch
from patchpipe.loading.precheck import check_folder, quantised
from patchpipe.loading.quantised import without_tensor
from patchpipe.planner.machine.here import cpu_ranks

if TYPE_CHECKING:
    from patchpipe.planner.automatic import Taken

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
Wanted = ParallelConfig | AutoLayout | None  # None is plain diffusers


def read_wanted(config: ParallelConfig | AutoLayout | str | None) -> Wanted:
    """What a user's ``config`` asks for.

    Raises:
        ValueError: It is none of those there are.
    """
    if config is None:
        return AutoLayout()
    if isinstance(config, (ParallelConfig, AutoLayout)):
        return config
    if config == PLAIN:
        return None
    raise ValueError(f'config={config!r} must be a ParallelConfig, an AutoLayout, "{PLAIN}", or None to choose one')


def devices_for(wanted: Wanted, devices: str | Sequence[str] | None, threads: int | None) -> tuple[str, ...]:
    """The device of every rank; where a layout is yet to be chosen, all devices there are.

    Raises:
        ValueError: A device is unknown or absent, or there are not as many as ranks.
    """
    backend = "auto" if wanted is None else wanted.backend
    if not isinstance(wanted, AutoLayout):
        return tuple(choose_devices(devices, 1 if wanted is None else wanted.world_size, backend))
    if devices is not None and not isinstance(devices, str):
        count = len(devices)
    elif devices == "cpu" or (devices is None and not cuda_count()):
        count = cpu_ranks(available_cores() // max(1, threads or 1))
    else:
        count = max(1, cuda_count()) if devices in (None, "cuda") else 1
    return tuple(choose_devices(devices, count, backend))


def settle(
    wanted: Wanted,
    crew: Crew,
    folder: Path,
    dtype: str | Mapping[str, str] | None,
    options: Mapping[str, Any],
    timeout: float,
) -> tuple[ParallelConfig | None, str | None]:
    """The layout of an engine, which the model can be loaded in, and why where it was chosen.

    Args:
        wanted: What the user asks for.
        crew: The workers, one of which chooses.
        folder: The model.
        dtype: What its weights are to be.
        options: Options of ``from_pretrained``.
        timeout: Seconds it may take.

    Raises:
        ValueError: The model does not fit it.
        PatchpipeError: The worker died or fell silent.
    """
    if not isinstance(wanted, AutoLayout):
        return wanted, None
    if quantised(folder, options):
        wanted = without_tensor(wanted)
    name = dtype.get("transformer", dtype.get("default")) if isinstance(dtype, Mapping) else dtype
    planned = ask(crew.members[0], wanted, str(folder), crew.devices, name, {}, timeout)
    if planned.config is not None:
        check_folder(folder, planned.config, options)
    return planned.config, planned.why


def ask(
    worker: Worker,
    auto: AutoLayout,
    path: str,
    devices: Sequence[str],
    dtype: str | None,
    options: Mapping[str, Any],
    timeout: float,
) -> Planned:
    """Has a worker choose.

    Raises:
        PatchpipeError: It died or fell silent.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    worker.channel.send(Plan(auto, path, tuple(devices), available_cores(), dtype, hub))
    outcome = Watch([worker], devices[:1], Planned, 0, "choosing a layout", timeout).run()
    if outcome.failure is not None:
        raise outcome.failure.error
    return outcome.answers[0]


def answer(plan: Plan) -> Planned:
    """The worker's side."""
    from patchpipe.planner.automatic import one_device
    from patchpipe.planner.choosing import layout_for_model

    try:
        taken: Taken = layout_for_model(plan.auto, plan.path, plan.devices, plan.cores, plan.dtype, **plan.hub)
    except Exception as error:  # a request can be served all the same
        taken = one_device(plan.auto, f"the planner failed: {type(error).__name__}: {error}")
    return Planned(0, taken.config, taken.why)
