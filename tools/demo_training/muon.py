"""Muon: momentum whose steps are orthogonalised, for the matrices of the blocks.

The rate is matched to AdamW's: a step of a (rows, columns) matrix has a root mean square of about
``0.2 * lr``, whatever its shape. Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

# The quintic a*x + b*x^3 + c*x^5, steep at zero: it takes singular values to about 1 in few steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS_OF_ADAMW = 0.2


def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Move all the singular values of a matrix, or of a batch of them, near 1 (Newton-Schulz).

    Args:
        matrix: Shape (..., rows, columns).
        steps: Iterations.
        dtype: What to compute in; ``None`` keeps the matrix's own.
    """
    x = matrix.to(dtype or matrix.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """Nesterov momentum with orthogonalised steps.

    Args:
        params: Matrices only.
        lr: The rate, on AdamW's scale.
        momentum: Decay of the momentum.
        weight_decay: Decoupled weight decay.
        steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        steps: int = 5,
    ) -> None:
        matrices = list(params)
        bad = [tuple(p.shape) for p in matrices if p.ndim != 2]
        if bad:
            raise ValueError(f"Muon steps matrices only, got shapes {bad}")
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _by_shape(group["params"]):
                self._step_batch(params, group)
        return loss

    def _step_batch(self, params: list[Tensor], group: dict[str, Any]) -> None:
        update = torch.stack([self._momentum(p, group["momentum"]) for p in params])
        rows, columns = params[0].shape
        compute = torch.bfloat16 if update.is_cuda else None
        update = orthogonalise(update, group["steps"], compute)
        scale = group["lr"] * RMS_OF_ADAMW * max(rows, columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind()), alpha=-scale)

    def _momentum(self, param: Tensor, decay: float) -> Tensor:
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 1 - decay)
        return grad.lerp(state["momentum"], decay)


def _by_shape(params: list[Tensor]) -> list[list[Tensor]]:
    shapes: dict[torch.Size, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            shapes.setdefault(param.shape, []).append(param)
    return list(shapes.values())
