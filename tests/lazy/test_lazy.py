"""Lazy tensors against plain ones: every operation, on the rank that holds the patches and on one that does not."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from patchpipe.lazy.latent import PatchTensor, lift, materialise_tree, patch_of

SHAPE, BOUNDS = (2, 4, 16, 8), (0, 4, 10, 16)


class Wire:
    """Both ranks of a request, run one after the other: what the holder shares waits in a queue."""

    def __init__(self, queue: deque[Tensor], holder: bool = True) -> None:
        self.queue, self.holder, self.notes = queue, holder, []

    def share(self, full: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.holder:
            assert full is not None
            self.queue.append(full.clone())
            return full
        assert full is None
        full = self.queue.popleft()
        assert (full.shape, full.dtype, full.device) == (tuple(shape), dtype, device)
        return full

    def note(self, reason: str) -> None:
        self.notes.append(reason)


def values(seed: int = 0, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def promise(
    source: Tensor, exchange: Wire, dim: int = 2, bounds: Sequence[int] = BOUNDS, taken: list[int] | None = None
) -> PatchTensor:
    def take(index: int) -> Tensor:
        if taken is not None:
            taken.append(index)
        return source.narrow(dim, bounds[index], bounds[index + 1] - bounds[index]).clone()

    return PatchTensor.promise(
        source.shape, source.dtype, source.device, dim, bounds, take if exchange.holder else None, exchange
    )


def lazy(source: Tensor | None = None, **options: Any) -> tuple[PatchTensor, Wire]:
    exchange = Wire(deque())
    return promise(values() if source is None else source, exchange, **options), exchange


def both_ranks(program: Callable[..., Any], *sources: Tensor) -> tuple[Any, list[str]]:
    """What the program returns with lazy operands, the same on both ranks, and what materialised."""
    queue: deque[Tensor] = deque()
    results, notes, kinds = [], [], []
    for holder in (True, False):
        exchange = Wire(queue, holder)
        result = program(*(promise(source, exchange) for source in sources))
        notes.append(list(exchange.notes))
        kinds.append([(type(x), x.shape, x.stride(), x.dtype) for x in leaves(result)])
        results.append(materialise_tree(result, "result"))
    assert not queue
    assert notes[0] == notes[1]
    assert kinds[0] == kinds[1]
    assert all(torch.equal(a, b) for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True))
    return results[0], notes[0]


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    x = x * 1.0
    write(x)
    return x


def assign(*where: Any) -> Callable[[Tensor, Any], None]:
    return lambda x, value: x.__setitem__(where, value)


PLAIN, SMALL, INDEX = values(7), torch.tensor(0.37), torch.tensor([3, 0, 2])
MASK = values(8) > 0

STAY_LAZY: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda x, y: 2 - (x + y * 0.3) / 1.7 + x**2,
    "reciprocal": lambda x, y: 1 / x,
    "plain operand": lambda x, y: PLAIN * x + PLAIN,
    "plain broadcast": lambda x, y: x + PLAIN[:, :1, :, :1] - PLAIN[0, 0] * values(3, (2, 1, 1, 1)),
    "zero-dim": lambda x, y: x * SMALL - SMALL.double() * y,
    "zero-dim promotes": lambda x, y: (x * 4).to(torch.int32) * SMALL,
    "where": lambda x, y: torch.where(MASK, x, y) + torch.where(x > 0, 1.0, PLAIN),
    "clamp, sqrt": lambda x, y: x.clamp(-0.5, 0.5).abs().sqrt() + torch.exp(y),
    "casts": lambda x, y: (x.to(torch.bfloat16) * 3 + y.bfloat16()).float().double(),
    "device": lambda x, y: x.to("cpu").to(device="cpu", dtype=torch.float16).cpu(),
    "clone, detach": lambda x, y: x.clone().detach().contiguous() + y.data,
    "comparison": lambda x, y: (x > y) & ~(x < 0.1),
    "guidance": lambda x, y: x.chunk(2)[0] + 3.5 * (x.chunk(2)[1] - x.chunk(2)[0]),
    "select": lambda x, y: x[1] + y[0, :, :, :],
    "select inside": lambda x, y: x[:, :, :, -1] * y[:, 2:3, :, 0],
    "slice": lambda x, y: x[:, 1:3] + y[:, ::2] - x[:, :2, :, 1:2],
    "slice along the cut": lambda x, y: x[:, :, 3:12] + y[:, :, 3:12],
    "slices": lambda x, y: x[:, :, :7] - y[:, :, :7].narrow(1, 0, 1),
    "narrow, split, unbind": lambda x, y: [x.narrow(1, 1, 2), *y.split([1, 3], 1), *x.unbind(0), *y.split(3, -1)],
    "split along the cut": lambda x, y: list(x.split([5, 11], 2)),
    "cat": lambda x, y: torch.cat([x, PLAIN, y], 1) * torch.cat([PLAIN, x, x], dim=-3),
    "cat of two types": lambda x, y: torch.cat([x, PLAIN.double()], 0),
    "cat along the cut": lambda x, y: torch.cat([PLAIN, x, PLAIN[:, :, :3]], 2) * 2,
    "cat, then slice": lambda x, y: torch.cat([x, PLAIN], 2)[:, :, :16] + y,
    "stack": lambda x, y: torch.stack([x, y, PLAIN], dim=1) + torch.stack([y, x, x], 1),
    "stack last": lambda x, y: torch.stack([x, PLAIN], -1),
    "unsqueeze, squeeze": lambda x, y: (x.unsqueeze(0) + y[:, :1].squeeze(1).unsqueeze(1)).squeeze(),
    "squeeze of one": lambda x, y: x[:1, :1].squeeze(),
    "permute, transpose": lambda x, y: x.permute(0, 2, 3, 1).transpose(-1, -2).permute(0, 1, 2, 3) * 2,
    "movedim": lambda x, y: x.movedim(1, -1) + PLAIN.movedim(1, -1),
    "t": lambda x, y: x[0, 0].t() + y[0, 0].T,
    "expand": lambda x, y: x[:, :1].expand(2, 4, 16, 8) + y.expand(3, -1, -1, -1, -1),
    "repeat": lambda x, y: x.repeat(2, 1, 1, 3) + y.tile(2, 1, 1, 3) + x.repeat(3, 1, 1, 1, 1)[0].repeat(2, 1, 1, 3),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, dim=0),
    "index_select": lambda x, y: x.index_select(1, INDEX) + y[:, INDEX] + y[:, [3, 0, 2]],
    "flip, roll": lambda x, y: x.flip(1) + y.roll(1, 3),
    "reshape": lambda x, y: x.reshape(2, 2, 2, 16, 2, 4) * 2 + y.view(2, 2, 2, 16, 2, 4),
    "flatten": lambda x, y: x.flatten(0, 1) + y.reshape(8, 16, 8),
    "reshape a permuted": lambda x, y: x.permute(2, 0, 1, 3).reshape(16, 64) + 1,
    "inner reduction": lambda x, y: x.norm(dim=-1, keepdim=True) * y + y.mean(-1, True) + x.std(3, keepdim=True),
    "inner maximum": lambda x, y: x.amax(-1) + y.sum(dim=3),
    "einsum": lambda x, y: torch.einsum("k,bkc...->bc...", values(5, (2,)), torch.stack([x, y], 1)),
    "einsum, permuting": lambda x, y: torch.einsum("kb,bchw->khcbw", values(5, (3, 2)), x),
    "in place": lambda x, y: written(x, lambda z: z.add_(y).mul_(2).sub_(PLAIN, alpha=0.5).clamp_(-1, 1)),
    "in place operators": lambda x, y: x.clone().__iadd__(y).__imul__(0.5),
    "in place keeps the type": lambda x, y: written(x.bfloat16(), lambda z: z.add_(PLAIN)),
    "fill, zero": lambda x, y: written(x, lambda z: z.fill_(2)) + written(y, lambda z: z.zero_()),
    "copy": lambda x, y: written(x, lambda z: z.copy_(y)),
    "copy plain": lambda x, y: written(x, lambda z: z.copy_(PLAIN)) + y,
    "masked_fill": lambda x, y: x.masked_fill(MASK, 0.5) + written(y, lambda z: z.masked_fill_(MASK, 1.0)),
    "assign everything": lambda x, y: written(x, lambda z: z.__setitem__(slice(None), PLAIN * 2)),
    "assign to a slice": lambda x, y: written(x, lambda z: assign(slice(None), slice(0, 1))(z, PLAIN[:, :1])),
    "assign along the cut": lambda x, y: written(x, lambda z: assign(..., slice(2, 7), slice(None))(z, y[:, :, 2:7])),
    "assign the first frame": lambda x, y: written(x, lambda z: assign(slice(None), slice(None), slice(1))(z, 7.0)),
    "assign to a selection": lambda x, y: written(x, lambda z: assign(0)(z, y[1])),
    "write through views": lambda x, y: written(x, lambda z: z.permute(0, 2, 3, 1)[..., 0].unsqueeze(0).mul_(3)),
    "augmented view": lambda x, y: written(x, lambda z: z[:, 1].add_(y[:, 2])),
    "zeros_like grows": lambda x, y: torch.zeros_like(x).add_(y).add_(x) + torch.full_like(x, 2.0) * x,
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", STAY_LAZY)
def test_stays_lazy_and_bit_equal(name: str, mode: Callable[[], Any]) -> None:
    program, x, y = STAY_LAZY[name], values(1), values(2)
    with mode():
        expected = program(x.clone(), y.clone())
        result, notes = both_ranks(program, x, y)
    assert notes == []
    for one, other in zip(leaves(result), leaves(expected), strict=True):
        assert type(one) is Tensor
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def quantile(x: Tensor, y: Tensor) -> Tensor:
    return torch.quantile(x.flatten(1), 0.5, dim=1)


NEED_ALL: dict[str, tuple[Callable[..., Any], int]] = {
    "sum": (lambda x, y: x.sum() + x.mean() * x.std(), 1),
    "std": (lambda x, y: x.std(dim=(1, 2, 3), keepdim=True) * y, 1),
    "outer mean": (lambda x, y: x.mean(1), 1),
    "quantile": (quantile, 1),
    "both": (lambda x, y: torch.cat([x, y], 2), 2),
    "convolution": (lambda x, y: torch.nn.functional.conv2d(x, values(4, (3, 4, 3, 3)), padding=1), 1),
    "matmul": (lambda x, y: x @ y.mT, 2),
    "linear": (lambda x, y: torch.nn.functional.linear(x, values(4, (5, 8))), 1),
    "long einsum": (lambda x, y: torch.einsum("bchw,wk->bchk", x, values(4, (8, 5))), 1),
    "select along the cut": (lambda x, y: x[:, :, 3] * 2, 1),
    "stride along the cut": (lambda x, y: x[:, :, ::2] * 2, 1),
    "two cuts": (lambda x, y: x[:, :, :8] + y[:, :, 8:], 2),
    "shifted cut": (lambda x, y: x.permute(0, 1, 3, 2)[..., :8] + y[:, :, :8], 2),
    "boolean index": (lambda x, y: x[MASK], 1),
    "two indices": (lambda x, y: x[INDEX % 2, INDEX], 1),
    "flip of the cut": (lambda x, y: x.flip(2), 1),
    "repeat of the cut": (lambda x, y: x.repeat(1, 1, 2, 1), 1),
    "merged cut": (lambda x, y: x.reshape(2, -1), 1),
    "other bits": (lambda x, y: x.view(torch.int32), 1),
    "masked write": (lambda x, y: written(x, lambda z: assign(MASK)(z, 0.0)), 1),
    "random write": (lambda x, y: written(x, lambda z: z.normal_(generator=torch.Generator().manual_seed(3))), 1),
    "lazy into plain": (lambda x, y: written(PLAIN, lambda z: assign(slice(None), 0)(z, x[:, 0])), 1),
    "plain augmented": (lambda x, y: written(PLAIN, lambda z: z.add_(x)), 1),
    "materialised once": (lambda x, y: x.sum() + (x.sum() + x.amax() + x[0].sum()), 1),
    "still an operand": (lambda x, y: (x.sum() * 0 + x, x * y + y, x + PLAIN), 1),
    "view of a materialised": (lambda x, y: (x.sum(), x[:, 1] * y[:, 1]), 1),
    "write after": (lambda x, y: (x.sum(), x.mul_(2), x * y, x), 1),
    "lazy into materialised": (lambda x, y: (x.sum(), x.add_(y), x * 2), 2),
    "written reshape": (lambda x, y: written(x, lambda z: z.view(2, 2, 2, 16, 8).mul_(2)), 1),
    "foreach": (lambda x, y: torch._foreach_add([x, y], 1.0), 2),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NEED_ALL)
def test_materialises_and_is_bit_equal(name: str, mode: Callable[[], Any]) -> None:
    (program, count), x, y = NEED_ALL[name], values(1), values(2)
    with mode():
        expected = program(x.clone(), y.clone())
        result, notes = both_ranks(program, x, y)
    assert len(notes) == count
    for one, other in zip(leaves(result), leaves(expected), strict=True):
        assert torch.equal(one, other)


def test_notes_name_the_operation() -> None:
    x, exchange = lazy()
    x.sum()
    x.mean()
    assert exchange.notes == ["aten.sum"]


# ------------------------------------------------------------------------------------------ evaluation


def test_a_patch_takes_only_what_it_needs_and_only_once() -> None:
    taken: list[int] = []
    x, exchange = lazy(taken=taken)
    y = x * 2 + x
    assert taken == []
    assert torch.equal(y.patch(1), (values() * 2 + values())[:, :, 4:10])
    assert taken == [1]
    y.patch(1)
    (y + x).materialise("test")
    assert taken == [1, 0, 2]
    assert exchange.notes == ["test"]


def test_a_failed_take_is_not_repeated() -> None:
    calls = []

    def take(index: int) -> Tensor:
        calls.append(index)
        raise TimeoutError

    x = PatchTensor.promise(SHAPE, torch.float32, "cpu", 2, BOUNDS, take, Wire(deque()))
    with pytest.raises(TimeoutError):
        x.patch(0)
    with pytest.raises(RuntimeError, match="patch 0"):
        x.patch(0)
    assert calls == [0]


def test_only_the_holder_has_patches() -> None:
    x = promise(values(), Wire(deque(), holder=False))
    with pytest.raises(RuntimeError, match="first stage"):
        (x * 2).patch(0)


def test_long_chains_evaluate_and_die_without_recursion() -> None:
    x, _ = lazy()
    y, expected = x, values()
    for _ in range(3000):
        y, expected = y + 1, expected + 1
    assert torch.equal(y.patch(2), expected[:, :, 10:])
    z = x
    for _ in range(30000):
        z = z.add(1)
    del z


def test_an_evaluated_chain_lets_go_of_its_history() -> None:
    x, _ = lazy()
    operand = values(3)
    y = x * 2 + operand
    gone = weakref.ref(operand), weakref.ref(x._value)
    del operand, x
    y.patch(0)
    gc.collect()
    assert gone[0]() is not None
    y.patch(1)
    y.patch(2)
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


@pytest.mark.parametrize("holder", [True, False])
def test_steps_do_not_pile_up(holder: bool) -> None:
    exchange = Wire(deque(), holder)
    x: Tensor = values()
    counts = []
    for _ in range(6):
        x = x - 0.1 * promise(values(3), exchange)
        x.clone().add_(1)
        if holder:
            [x.patch(index) for index in range(3)]
        gc.collect()
        counts.append(sum(type(thing).__module__ == "patchpipe.lazy.nodes" for thing in gc.get_objects()))
    assert counts[1] == counts[-1]
    if not holder:
        assert x._value.node is None


# -------------------------------------------------------------------------------------- writes and views


def test_views_see_later_writes_and_older_expressions_do_not() -> None:
    def program(x: Tensor, y: Tensor) -> Any:
        x = x + 0
        view, older = x[:, 1], x * 2
        before = view * 1
        x.add_(y)
        between = view * 1
        x[:, 1] = 5.0
        view.mul_(3)
        return view + 0, older, before, between, x

    x, y = values(1), values(2)
    result, notes = both_ranks(program, x, y)
    assert notes == []
    assert all(torch.equal(a, b) for a, b in zip(result, program(x, y), strict=True))


def test_a_write_to_a_materialised_tensor_spares_older_expressions() -> None:
    def program(x: Tensor, y: Tensor) -> Any:
        view = x[:, 1]
        total = x.sum()
        older, of_view = x + y, view + y[:, 0]
        x.mul_(2)
        assign(0)(x, 1.0)
        newer = x + y
        view.zero_()
        return total, older, of_view, newer, x, view, x * y

    x, y = values(1), values(2)
    result, notes = both_ranks(program, x.clone(), y)
    assert notes == ["aten.sum"]
    assert all(torch.equal(a, b) for a, b in zip(result, program(x.clone(), y), strict=True))


def test_what_materialise_returns_shares_memory() -> None:
    x, exchange = lazy()
    full = x.materialise("test")
    full.add_(1)
    x[:, 0] = 3.0
    assert x.materialise("test") is full
    assert bool((full[:, 0] == 3).all())
    assert torch.equal(x[:, 1] + 0, values()[:, 1] + 1)
    assert exchange.notes == ["test"]


@pytest.mark.parametrize("large", [True, False])
def test_a_captured_tensor_may_not_change(large: bool) -> None:
    x, _ = lazy()
    plain = values(3) if large else values(3, (1, 4, 1, 1))
    y, expected = x + plain, values() + plain
    plain.add_(1)
    if large:
        with pytest.raises(RuntimeError, match="modified in place"):
            y.patch(0)
    else:
        assert torch.equal(y.materialise("test"), expected)


def test_a_captured_tensor_written_by_a_lazy_one_is_noticed() -> None:
    x, exchange = lazy()
    plain = values(3)
    y = x + plain
    plain.add_(promise(values(4), exchange))
    with pytest.raises(RuntimeError, match="modified in place"):
        y.patch(0)


def test_a_captured_view_of_a_materialised_tensor_is_noticed() -> None:
    x, exchange = lazy()
    alias = x.materialise("test").view(SHAPE)
    y = promise(values(4), exchange) + alias
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.patch(0)


def test_inference_tensors_are_copied_when_captured() -> None:
    with torch.inference_mode():
        plain = values(3)
        x, _ = lazy()
        y, expected = x + plain, values() + plain
        plain.add_(1)
        assert torch.equal(y.materialise("test"), expected)


# ---------------------------------------------------------------------------------- factories and python


@pytest.mark.parametrize("holder", [True, False])
def test_factories_need_no_values(holder: bool) -> None:
    exchange = Wire(deque(), holder)
    x = promise(values(), exchange).permute(0, 2, 3, 1) * 2
    plain = values().permute(0, 2, 3, 1) * 2
    for make in (torch.randn_like, torch.rand_like, lambda z: torch.randint_like(z, 9)):
        torch.manual_seed(5)
        expected, after = make(plain), torch.rand(1)
        torch.manual_seed(5)
        made = make(x)
        assert type(made) is Tensor
        assert made.stride() == expected.stride()
        assert torch.equal(made, expected)
        assert torch.equal(torch.rand(1), after)
    for made in (torch.empty_like(x), x.new_zeros(3), x.new_full((2,), 1.0), x.new_ones(1), x.new_empty(2)):
        assert type(made) is Tensor
    for made, value in ((torch.zeros_like(x), 0), (torch.ones_like(x), 1), (torch.full_like(x, 3), 3)):
        assert (made.shape, made.stride(), made.dtype) == (x.shape, plain.stride(), x.dtype)
        assert bool((made == value).all())
    assert exchange.notes == []


def test_lifted_tensors() -> None:
    def program(x: Tensor) -> Tensor:
        return lift(PLAIN, x).add_(x)

    before = PLAIN.clone()
    result, notes = both_ranks(program, values(1))
    assert torch.equal(result, PLAIN + values(1))
    assert notes == []
    assert torch.equal(PLAIN, before)
    assert lift(PLAIN, PLAIN) is PLAIN


def test_python_conversions() -> None:
    plain = values()
    x, exchange = lazy()
    assert np.array_equal(x.numpy(), plain.numpy())
    assert np.array_equal(np.asarray(x), plain.numpy())
    assert exchange.notes == ["numpy"]
    assert lazy()[0].tolist() == plain.tolist()
    y = lazy()[0]
    assert y[0, 0, 0, 0].item() == plain[0, 0, 0, 0].item()
    assert float(lazy()[0].sum()) == float(plain.sum())
    assert bool((lazy()[0] == plain).all())
    assert torch.equal(lazy()[0], plain)
    assert torch.equal(torch.from_dlpack(lazy()[0]), plain)
    assert torch.equal(torch.as_tensor(lazy()[0]) * 1, plain)
    assert [row.shape for row in lazy()[0]] == [plain.shape[1:]] * 2


def test_printing_does_not_materialise() -> None:
    x, exchange = lazy()
    shown = f"{x!r} {x}"
    assert "lazy" in shown
    assert "(2, 4, 16, 8)" in shown
    assert exchange.notes == []
    x.sum()
    assert "materialised" in repr(x)


def test_copies_and_pickles() -> None:
    x, exchange = lazy()
    deep, shallow = copy.deepcopy({"a": x, "b": x}), copy.copy(x)
    assert exchange.notes == []
    assert deep["a"] is deep["b"]
    x.add_(1)
    assert torch.equal(deep["a"].materialise("test"), values())
    assert torch.equal(shallow.materialise("test"), values() + 1)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(x)), torch.load(buffer)):
        assert type(loaded) is Tensor
        assert torch.equal(loaded, values() + 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.data_ptr(),
        lambda x: x.untyped_storage(),
        lambda x: x.unsqueeze_(0),
        lambda x: x.t_(),
        lambda x: x.resize_(3),
        lambda x: setattr(x, "data", values()),
        lambda x: torch.add(values(), 1, out=x),
    ],
)
def test_what_cannot_work_says_so(call: Callable[[Tensor], Any]) -> None:
    x, _ = lazy()
    with pytest.raises(NotImplementedError):
        call(x)


def test_out_of_plain_works() -> None:
    x, exchange = lazy()
    out = torch.empty(SHAPE)
    torch.add(x, 1, out=out)
    assert torch.equal(out, values() + 1)
    assert exchange.notes == ["aten.add"]


@pytest.mark.parametrize("bounds", [(0, 16, 8), (1, 16), (0, 8), (0,)])
def test_bad_bounds_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not cut"):
        PatchTensor.promise(SHAPE, torch.float32, "cpu", 2, bounds, lambda _: PLAIN, Wire(deque()))


def test_shape_errors_come_at_once() -> None:
    x, _ = lazy()
    with pytest.raises(RuntimeError):
        x + values(1, (2, 5, 16, 8))
    with pytest.raises(RuntimeError):
        x.add_(values(1, (3, 2, 4, 16, 8)))
    with pytest.raises(RuntimeError):
        x.to(torch.int32).mul_(0.5)


# ------------------------------------------------------------------------------------- for the callers


@pytest.mark.parametrize("start_stop", list(itertools.pairwise((0, 3, 4, 10, 12, 16))))
def test_patch_of(start_stop: tuple[int, int]) -> None:
    start, stop = start_stop
    expected = values()[:, :, start:stop]
    x, exchange = lazy()
    for index in range(3):
        assert torch.equal(patch_of(x, 2, start, stop, index), expected)
        assert torch.equal(patch_of(values(), -2, start, stop, index), expected)
    assert torch.equal(patch_of(x, 3, 2, 5, 0), values()[..., 2:5])
    assert exchange.notes == []
    x.sum()
    assert torch.equal(patch_of(x, 2, start, stop, 0), expected)


def values_of_the_end() -> Tensor:
    return torch.cat([PLAIN, PLAIN * 2], 2)[:, :, 2:18]


def test_patch_of_waits_for_no_more_than_it_needs() -> None:
    taken: list[int] = []
    x, _ = lazy(taken=taken)
    longer = torch.cat([x, PLAIN], 2)
    patch_of(longer, 2, 4, 10, 1)
    assert taken == [1]
    for known in (longer, longer.to(longer.dtype)):  # what was joined to it waits for no patch
        assert torch.equal(patch_of(known, 2, 20, 24, 2), PLAIN[:, :, 4:8])
    assert taken == [1]
    assert torch.equal(patch_of(torch.cat([longer, PLAIN, PLAIN * 2], 2), 2, 34, 50, 0), values_of_the_end())
    assert taken == [1]
    assert torch.equal(patch_of(longer * 2, 2, 20, 24, 2), PLAIN[:, :, 4:8] * 2)
    assert taken == [1, 2]
    patch_of(longer, 2, 5, 9, 0)
    assert taken == [1, 2]


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass(frozen=True)
class Box:
    inside: Any
    name: str = "box"


def test_materialise_tree() -> None:
    x, exchange = lazy()
    tree = {
        "tuple": (x, 1),
        "pair": Pair([x], None),
        "output": Transformer2DModelOutput(sample=x),
        "box": Box(x),
        "ordered": OrderedDict(a=x),
    }
    whole = materialise_tree(tree, "test")
    assert exchange.notes == ["test"]
    found = (
        *(whole["tuple"][0], whole["pair"].a[0], whole["output"].sample, whole["output"]["sample"]),
        *(whole["box"].inside, whole["ordered"]["a"]),
    )
    assert all(type(one) is Tensor and torch.equal(one, values()) for one in found)
    assert type(whole["output"]) is Transformer2DModelOutput
    assert tree["output"].sample is x
    untouched = {"a": [PLAIN, Box(1)]}
    assert materialise_tree(untouched, "test") is untouched
