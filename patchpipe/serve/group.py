"""One group of devices, all in reach of this process: its models, who calls their engines, and who decides.

A service on one machine has one. In a fleet every replica has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchpipe.scheduling import Policy, policy_named
from patchpipe.serve.metrics import Metrics
from patchpipe.serve.settings import Settings
from patchpipe.serve.steer.believed import planner_of
from patchpipe.serve.steer.conductor import Conductor
from patchpipe.serve.steer.costs import LiveCosts, Machine
from patchpipe.serve.steer.deciding import Decider
from patchpipe.serve.steer.runs import Hand
from patchpipe.serve.steer.shapes import shape_of
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Kind, Work


class Group:
    """Models on the same devices.

    Args:
        models: The models.
        settings: What the operator decided.
        metrics: Figures.
        policy: Who has which devices next; ``None`` takes the one that the settings name.

    Attributes:
        models: The models by the service's name.
        metrics: Figures.
        machine: What there is to share.
        costs: What steps take.
        conductor: Takes requests.
        policy: The policy's name.
    """

    def __init__(
        self, models: Sequence[Model], settings: Settings, metrics: Metrics, policy: Policy | None = None
    ) -> None:
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.metrics = metrics
        self.machine = machine_of(models, settings.in_flight)
        self.costs = LiveCosts(self.machine, planner_of(self.models))
        chosen = policy or policy_named(settings.policy)
        self.policy = chosen.name
        decider = Decider(
            self.machine,
            chosen,
            self.costs,
            admission=settings.admission,
            scale=settings.deadline_scale,
            failed=metrics.failed_decisions.inc,
        )
        self._hands = {name: Hand(model, settings.lora_folder) for name, model in self.models.items()}
        self.conductor = Conductor(self.models, decider, self._hands, metrics, settings.limits.waiting)

    def start(self) -> None:
        """Starts the models that are not running.

        Raises:
            Exception: One could not start.
        """
        for model in self.models.values():
            if model.cause is not None:
                model.start()

    def ask_planner(self) -> None:
        """Asks what usual requests take, so that the first of them need not wait for the answer."""
        for model in self.models.values():
            kind: Kind = "clip" if model.facts.clips else "picture"
            self.costs.know(shape_of(Work("usual", model.name, kind, {}, (0,)), model.facts))

    def look_on(self) -> None:
        """Gets models up again whose workers died while nothing was asked of them."""
        for model in self.models.values():
            model.check()

    def state(self) -> dict[str, Any]:
        """Nothing that models and requests do not say."""
        return {}

    def close(self) -> None:
        """Ends the models; its conductor has been closed."""
        for model in self.models.values():
            model.close()
        for hand in self._hands.values():
            hand.close()


def machine_of(models: Sequence[Model], in_flight: int) -> Machine:
    """What there is to share: the devices where all models are elastic, else the machine as a whole."""
    layouts = {model.facts.elastic for model in models if model.cause is None}
    counts = {0 if layout is None else layout.ranks for layout in layouts}
    if len(counts) != 1 or 0 in counts:
        return Machine(together=in_flight)
    [devices] = counts
    degrees = tuple(2**power for power in range(devices.bit_length()))
    return Machine(devices, degrees, in_flight, elastic=True)
