"""Which request has which devices next: one object that decides, for the service and for the simulator alike.

    scheduler = Scheduler(policy_named("balanced"), costs)
    request = with_deadline(Request("r1", Shape("flux", 1024, 1024), 28, arrival=now, deadline=inf), costs, devices=8)
    reason = scheduler.refusal(state, request)           # why it is turned away at once, or None
    decisions = scheduler.decide(State(now, devices, jobs))

``State`` says what there is, ``Decisions`` what should run where from each batch's next step boundary on. Times are
seconds on the caller's clock; nothing in here looks at one. What changes while the service runs are the costs: tell
``MeasuredCosts`` what steps really took. Many groups of devices have a ``Scheduler.decide`` each. ``dispatch`` says
which group a request goes to, by deadlines; ``Router`` by load alone, for thousands of groups.
"""

from __future__ import annotations

from patchpipe.scheduling.admission import Admission
from patchpipe.scheduling.costs import Costs, MeasuredCosts, Switch, TableCosts, kind_of
from patchpipe.scheduling.deadlines import DEFAULT_SCALE, alone, with_deadline
from patchpipe.scheduling.dispatch import Group, Waiting, dispatch
from patchpipe.scheduling.policies import POLICIES, Balanced, Genserve, Ordered, Policy, policy_named
from patchpipe.scheduling.router import Router
from patchpipe.scheduling.scheduler import Scheduler
from patchpipe.scheduling.state import Decisions, Job, Kind, Request, Run, Shape, State, Status

__all__ = [
    "DEFAULT_SCALE",
    "POLICIES",
    "Admission",
    "Balanced",
    "Costs",
    "Decisions",
    "Genserve",
    "Group",
    "Job",
    "Kind",
    "MeasuredCosts",
    "Ordered",
    "Policy",
    "Request",
    "Router",
    "Run",
    "Scheduler",
    "Shape",
    "State",
    "Status",
    "Switch",
    "TableCosts",
    "Waiting",
    "alone",
    "dispatch",
    "kind_of",
    "policy_named",
    "with_deadline",
]
