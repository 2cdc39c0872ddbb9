"""Attention with the log of the sum it was divided by, from a fused kernel: what parts of keys are merged with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from patchpipe.kernels.choice import kernel_for, refusals

CHANNEL_ALIGNMENT = 8  # all CUDA kernels want the channels of a head to be a multiple of it
BIAS_ALIGNMENT = 16  # elements between the rows of a mask, a multiple of which the efficient kernel wants


def attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log of the sum it was divided by, by a fused kernel.

    Args:
        query: ``[batch, heads, rows, channels]``, none of them 0.
        key: The same, with rows of its own.
        value: Like ``key``.
        scale: Of the products; ``None`` is one over the root of the channels.
        mask: Finite numbers to add to the scores, ``[batch, 1 or heads, 1, keys]`` in the query's dtype.

    Returns:
        The result, in the query's shape and dtype, and the natural log-sum-exp ``[batch, heads, rows]`` in
        float32, or in float64 for float64.

    Raises:
        NotImplementedError: No fused kernel of this device takes these tensors.
    """
    # The kernels read rows as unbroken memory and do not check that they are.
    query, key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value))
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if query.device.type == "cuda":
        return attend_on_cuda(query, key, value, scale, mask)
    raise NotImplementedError(f"ring has no attention kernel for {query.device.type}: use ulysses instead")


def attend_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same on CUDA, by the kernel torch itself would take; see ``attend_with_lse``."""
    rows, channels = query.shape[-2:]
    scale = channels**-0.5 if scale is None else scale
    padding = -channels % CHANNEL_ALIGNMENT  # zeros change neither products nor sums
    if padding:
        query, key, value = (functional.pad(rows_of, (0, padding)) for rows_of in (query, key, value))
    bias = None if mask is None else _bias(mask, query)
    kernel = kernel_for(query, key, value, bias, scale=scale)
    if kernel == SDPBackend.FLASH_ATTENTION:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        result, lse = flash(query, key, value, 0.0, False, False, scale=scale)[:2]
    elif kernel == SDPBackend.EFFICIENT_ATTENTION:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        result, lse = efficient(query, key, value, bias, True, 0.0, False, scale=scale)[:2]
    elif kernel == SDPBackend.CUDNN_ATTENTION:
        result, lse = _cudnn(query, key, value, bias, scale)
    else:
        raise NotImplementedError(
            f"ring needs a fused attention kernel, and none takes {query.dtype} with {channels} channels a head on "
            f"{query.device} ({refusals(query, key, value, bias)}): use float16, bfloat16 or float32, or ulysses "
            f"instead of ring"
        )
    return result[..., :channels], lse[..., :rows]  # the efficient kernel pads its sums to a multiple of 32


def _cudnn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """By cuDNN, which is the fastest on Hopper. Called by itself it takes rows in their plain order only."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    result, lse = cudnn(query, key, value, bias, True, 0.0, False, False, scale=scale)[:2]
    return result, lse.squeeze(-1) if lse.ndim == query.ndim else lse  # from torch 2.9 on it has a dim more


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as the kernels want it: ``[batch, heads, queries, keys]`` over rows of aligned memory."""
    batch, heads, rows, _ = query.shape
    keys = mask.shape[-1]
    return functional.pad(mask, (0, -keys % BIAS_ALIGNMENT))[..., :keys].expand(batch, heads, rows, keys)
