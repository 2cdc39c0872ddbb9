"""The scheduler: a state in, decisions out. No clock, no input or output, no chance."""

from __future__ import annotations

from patchpipe.scheduling.admission import Admission
from patchpipe.scheduling.costs import Costs
from patchpipe.scheduling.placing import place
from patchpipe.scheduling.policies.view import Policy, View
from patchpipe.scheduling.state import Decisions, Request, Run, State


class Scheduler:
    """Decides what runs where, and what is turned away.

    It has no memory of its own: the same state and costs give the same answers.

    Args:
        policy: How devices are shared.
        costs: What things take.
        admission: When a request is turned away; ``None`` turns none away.
    """

    def __init__(self, policy: Policy, costs: Costs, admission: Admission | None = None) -> None:
        self.policy, self.costs, self.admission = policy, costs, admission

    def decide(self, state: State) -> Decisions:
        """What should run where from now on.

        Ask when a request has come, when one is done, when devices come or go, and every few steps in between.

        Args:
            state: All requests that are not done, and the devices.

        Returns:
            The runs: those that are ending first, then the most urgent first.

        Raises:
            ValueError: The costs do not know a request's shape.
        """
        view = View(state, self.costs)
        ending = tuple(
            Run(tuple(job.id for job in jobs), devices) for devices, jobs in state.running.items() if jobs[0].ending
        )
        wishes = self.policy.plan(view) if view.room else []
        return Decisions(ending + place(wishes, state))

    def refusal(self, state: State, request: Request) -> str | None:
        """Why a request that has just come should be turned away; ``None`` accepts it.

        Args:
            state: As it is without the request.
            request: The request.

        Raises:
            ValueError: The costs do not know its shape.
        """
        return None if self.admission is None else self.admission.refusal(View(state, self.costs), request)
