"""One check from beginning to end: a tiny copy, the laws, and a plan where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers

from patchpipe.checking.laws import Finding, Trial
from patchpipe.checking.proposal.propose import propose as proposal_for
from patchpipe.checking.proposal.writing import written
from patchpipe.checking.subjects import Subject, known_plan, subject_of
from patchpipe.models.plan import ModelPlan


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        kind: The transformer class.
        told: What it was called with, in words.
        blocks: Blocks of the tiny copy.
        parameters: Its parameters.
        findings: What came of every law.
        proposed: The plan that was proposed, as Python to paste; empty where the class's own was tried.
        unknown: What the proposal could not tell.
    """

    kind: str
    told: str
    blocks: int
    parameters: int
    findings: tuple[Finding, ...]
    proposed: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing fails."""
        return not any(finding.outcome == "fails" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "class": self.kind, "called_with": self.told, "blocks": self.blocks, "parameters": self.parameters,
            "holds": self.holds, "findings": [finding.as_dict() for finding in self.findings],
            "proposed": self.proposed, "unknown": list(self.unknown),
        }  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Silences, inside, what the libraries tell of tiny models, and keeps torch to one thread."""
    own, threads = logging.getLogger("patchpipe"), torch.get_num_threads()
    told, libraries = own.level, (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    own.setLevel(logging.ERROR)
    torch.set_num_threads(1)  # as each rank has: another number adds sums up in another order
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        own.setLevel(told)
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def checked(
    place: str, settings: Mapping[str, Any], *, propose: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Report:
    """Checks a class of diffusers, or a folder's model.

    Args:
        place: The one or the other.
        settings: Fields of the tiny model's configuration that are set.
        propose: Whether a plan is proposed though the class has one.
        tell: Called with the name of each law before it is tried.

    Raises:
        ValueError: There is no such class, or it cannot be made tiny or called without being told more.
    """
    subject = subject_of(place, settings)
    plan, text = known_plan(subject.kind), ""
    unknown: tuple[str, ...] = ()
    if plan is None or propose:
        proposal = proposal_for(subject.model, subject.sample)
        plan, unknown, text = proposal.plan, proposal.unknown, written(proposal.plan)
    return report_of(subject, plan, tell, text, unknown)


def report_of(
    subject: Subject,
    plan: ModelPlan,
    tell: Callable[[str], None] = lambda _: None,
    text: str = "",
    unknown: tuple[str, ...] = (),
) -> Report:
    """Tries the laws on a subject under a plan."""
    findings = tuple(Trial(subject.model, subject.sample, plan).findings(tell=tell))
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    return Report(subject.kind, subject.told, len(plan.blocks_of(subject.model)), size, findings, text, unknown)
