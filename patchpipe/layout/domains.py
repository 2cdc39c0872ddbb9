"""Fast domains: ranks that reach each other over faster links than they reach the others.

A domain is what ``ulysses_inner`` says: so many neighbours of a Ulysses line. Nothing is sent to find out whether links
are as fast as that makes believe; but the domains must all be alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from patchpipe.layout.axes import Mesh
from patchpipe.layout.checks import check_at_least


def check_levels(ulysses: int, inner: int) -> None:
    """Refuses domains that do not make up a line.

    Args:
        ulysses: Ranks of a Ulysses line.
        inner: Ranks of a domain.

    Raises:
        ValueError: They do not divide.
    """
    check_at_least("ulysses_inner", inner, 1)
    if ulysses % inner:
        fits = [size for size in range(1, ulysses + 1) if ulysses % size == 0]
        raise ValueError(
            f"ulysses_inner={inner} does not divide ulysses={ulysses}, so that domains would differ in size: use "
            f"{' or '.join(map(str, fits))}"
        )


def check_values_first(ulysses: int, compiled: bool) -> None:
    """Refuses to send values first where there is no exchange, or where nothing outside sees them projected.

    Raises:
        ValueError: It is so.
    """
    if ulysses == 1:
        raise ValueError("values_first=True is for the exchange of ulysses: set ulysses to 2 or more, or leave it out")
    if compiled:
        raise ValueError(
            "values_first=True is not supported with compile=True, which hides where values are projected: leave one "
            "of them out"
        )


def check_changed_tokens(share: object, methods: frozenset[str], others: Sequence[str]) -> None:
    """Refuses to exchange only changed tokens where there is no exchange, or beside what nothing tests it with.

    Args:
        share: Of the tokens.
        methods: Those in use.
        others: What else is asked for that does not go with it.

    Raises:
        ValueError: It is so.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"changed_tokens={share!r} must be a share of the tokens, above 0 and at most 1, or None")
    if "ulysses" not in methods:
        raise ValueError(
            f"changed_tokens={share:g} is for the exchange of ulysses: set ulysses to 2 or more, or leave it out"
        )
    refused = [*sorted(methods - {"ulysses", "cfg", "data"}), *others]
    if refused:
        raise ValueError(
            f"changed_tokens={share:g} is not tested with {', '.join(refused)} and so refused: leave it out, or use "
            f"it with ulysses, cfg and data alone"
        )


def check_compressed(how: object, methods: frozenset[str], others: Sequence[str], synchronous: bool) -> None:
    """Refuses changes in eight bits where nothing is sent that has been sent before, or beside what is not tested.

    Args:
        how: In what they are sent.
        methods: Those in use.
        others: What else is asked for that does not go with it.
        synchronous: Whether every step is synchronous.

    Raises:
        ValueError: It is so.
    """
    if how != "int8":
        raise ValueError(f"compress={how!r} is unknown: use 'int8', or leave it out")
    if not methods & {"pipefusion", "distrifusion"} or synchronous:
        raise ValueError(
            "compress='int8' is for what goes from stage to stage, or to the ranks of distrifusion, after the warm-up: "
            "set pipefusion or distrifusion to 2 or more, with warmup=1, or leave it out"
        )
    refused = [*sorted(methods - {"pipefusion", "distrifusion", "cfg", "data"}), *others]
    if refused:
        raise ValueError(
            f"compress='int8' is not tested with {', '.join(refused)} and so refused: leave one of them out"
        )


def domains(shape: Sequence[int], inner: int) -> list[tuple[int, ...]]:
    """The ranks of every domain, in the order of their first rank.

    Args:
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        inner: Ranks of a domain.
    """
    found = set()
    for rank in range(prod(shape)):
        mesh = Mesh(tuple(shape), rank)
        ranks, at = mesh.along("ulysses"), mesh.at("ulysses")
        start = at - at % inner
        found.add(ranks[start : start + inner])
    return sorted(found)


def check_alike(shape: Sequence[int], inner: int, hosts: Sequence[str]) -> None:
    """Refuses domains of which one is on a single host, say, and another on two.

    Args:
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        inner: Ranks of a domain.
        hosts: What tells each rank's host from others.

    Raises:
        ValueError: The domains are not alike; the same text on every rank.
    """
    every = domains(shape, inner)
    first = _pattern([hosts[rank] for rank in every[0]])
    for ranks in every[1:]:
        if _pattern([hosts[rank] for rank in ranks]) != first:
            raise ValueError(
                f"ulysses_inner={inner} makes domains that are not alike: {_told(every[0], hosts)}, but "
                f"{_told(ranks, hosts)}. Start as many ranks on every host, or leave ulysses_inner out"
            )


def _pattern(hosts: Sequence[str]) -> list[int]:
    """Which members are on one host: the first is on host 0, the next on 0 too or on 1, and so on."""
    seen = list(dict.fromkeys(hosts))
    return [seen.index(host) for host in hosts]


def _told(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts))
    places = [f"host {names.index(host) + 1}" for host in dict.fromkeys(hosts[rank] for rank in ranks)]
    return f"ranks {', '.join(map(str, ranks))} are on {' and '.join(places)}"
