"""Which methods may be combined: those whose product is compared with one process by a test, and no others."""

from __future__ import annotations

Methods = frozenset[str]

TESTED: tuple[Methods, ...] = (
    frozenset({"pipefusion", "cfg", "ulysses"}),
    frozenset({"pipefusion", "ring", "ulysses"}),
    frozenset({"pipefusion", "cfg", "ring"}),
    frozenset({"pipefusion", "cfg", "tensor"}),
    frozenset({"pipefusion", "tensor", "ulysses"}),
    frozenset({"pipefusion", "ring", "tensor"}),
    frozenset({"pipefusion", "cfg", "data"}),
    frozenset({"pipefusion", "data", "ulysses"}),
    frozenset({"cfg", "distrifusion"}),
    frozenset({"data", "distrifusion"}),
)

TOGETHER: tuple[Methods, ...] = (  # what requests in flight together are tested with
    frozenset({"pipefusion", "cfg"}),
    frozenset({"pipefusion", "ulysses"}),
    frozenset({"pipefusion", "ring"}),
    frozenset({"pipefusion", "tensor"}),
    frozenset({"pipefusion", "data"}),
    frozenset({"distrifusion"}),
)

COMPILED: tuple[Methods, ...] = (  # the same for blocks that are compiled
    frozenset({"pipefusion", "cfg"}),
    frozenset({"pipefusion", "ulysses"}),
    frozenset({"pipefusion", "tensor"}),
    frozenset({"ring"}),
    frozenset({"distrifusion"}),
)


def check_combination(used: Methods) -> None:
    """Refuses a product of methods that nothing tests.

    Args:
        used: The methods with a degree above 1.

    Raises:
        ValueError: The product is not tested; names the nearest that is.
    """
    _check(used, TESTED, "together and so refused")


def check_together(used: Methods, compiled: bool = False) -> None:
    """Refuses requests in flight together under a product of methods for which nothing tests them.

    Args:
        used: The methods with a degree above 1.
        compiled: Whether blocks are compiled.

    Raises:
        ValueError: The product is not tested so; names the nearest that is.
    """
    if compiled:
        raise ValueError(
            "compile=True is not tested with requests in flight together and so refused: use compile=False, or paint "
            "them one after the other"
        )
    _check(used, TOGETHER, "with requests in flight together and so refused (paint them one after the other, or)")


def _check(used: Methods, known: tuple[Methods, ...], how: str) -> None:
    if any(used <= tested for tested in known):
        return
    nearest = max((used & tested for tested in known), key=lambda common: (len(common), sorted(common)))
    raise ValueError(
        f"{' × '.join(sorted(used))} is not tested {how}: the nearest that is tested is "
        f"{' × '.join(sorted(nearest))}; leave out {', '.join(sorted(used - nearest))}"
    )


def check_compiled(used: Methods) -> None:
    """Refuses to compile under a product of methods with which nothing tests it.

    Args:
        used: The methods with a degree above 1.

    Raises:
        ValueError: It is not tested.
    """
    if any(used <= tested for tested in COMPILED):
        return
    tested = "; ".join(" × ".join(sorted(methods)) for methods in COMPILED)
    raise ValueError(
        f"compile=True is not tested with {' × '.join(sorted(used))} and so refused: use compile=False, or one of "
        f"{tested}, each or part of it"
    )


def check_offloaded(tensor: int, compiled: bool, tier: str, gathered: bool, sharing: int) -> None:
    """Refuses what weights that come and go are not tested with.

    Args:
        tensor: Ranks that share matrices.
        compiled: Whether blocks are compiled.
        tier: Where the weights come from.
        gathered: Whether ranks copy them together.
        sharing: Ranks of Ulysses and Ring.

    Raises:
        ValueError: It is not tested, or cannot be.
    """
    if compiled:
        raise ValueError("compile=True is not tested with offload and so refused: leave one of them out")
    if gathered and sharing == 1:
        raise ValueError("offload gathered=True is for ranks that share a stage: use ulysses or ring, or leave it out")
    if tier == "disk" and tensor > 1:
        raise ValueError(
            f"offload tier='disk' reads whole matrices, but tensor={tensor} needs slices: use tier='host', or "
            f"tensor=1 with pipefusion or ulysses"
        )


def check_watched(methods: frozenset[str], compiled: bool, forecast: bool) -> None:
    """Whether the warm-up can end by the forecast's error.

    Raises:
        ValueError: Nothing tests the layout so, or there is no forecast.
    """
    others = methods - {"pipefusion", "cfg"}
    if others or compiled:
        named = ", ".join(sorted(others)) or "compile=True"
        raise ValueError(f'warmup="auto" is not supported with {named}: leave it out, or use warmup=2')
    if not forecast:
        raise ValueError('warmup="auto" needs a forecast: leave forecast=False out, or give a number of steps')
