"""Attention over `length` landmarks in place of n keys:  y = softmax(s q (Ê k)^T + log r) (F̂ v)

    q (..., m, d)   k (..., n, d)   v (..., n, d_v)   e, f (length, n_max), n <= n_max   ->   y (..., m, d_v)
    mask (..., n) or None, broadcast over the leading dimensions of k: bool, True where the key is real, or additive

Every sequence uses the first n columns of e and f. With w_j the weight of key j (1 where it is real, 0 where it is
masked, exp(mask_j - max mask) of an additive mask), r says how much of a landmark is there at all:

    r_i = sum_j |e_ij| w_j / sum_{j <= n_max} |e_ij|       Ê_ij = e_ij w_j / r_i       F̂_ij = f_ij w_j / r_i

A whole sequence (n = n_max, no mask) has r = 1, Ê = e and F̂ = f: the Linformer of the paper. Of a shorter or padded
one, masked keys contribute nothing, a landmark which averages keys averages the real ones, it has as much to say as it
has keys, and one without any takes no part: e = f = I is exact attention at every length and under every mask. A row
whose keys are all masked is 0, as aten.scaled_dot_product_attention has it.

                flops                              memory traffic, elements
    here        2 (n + m) length (d + d_v) heads   heads (m + n) (d + d_v) + e and f
    attention   2 n m (d + d_v) heads              heads (m + n) (d + d_v)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.core.cost import Cost
from fxcompress.core.errors import InputError


@torch.library.custom_op("fxcompress::linformer_attention", mutates_args=())
def linformer_attention(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The meaning of the op, and its implementation. scale None is 1 / sqrt(d). Raises `InputError` past n_max."""
    n, most = k.shape[-2], e.shape[1]
    if n > most:
        raise InputError(
            f"linformer_attention: the sequence has {n} keys; e and f were made for at most {most}. "
            f"Shorten the inputs, or rewrite the model with linformer{{max_length={n}}} or more."
        )
    return _attend(q, k, v, e, f, mask, scale).contiguous()


@linformer_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    e_real, f_real, share = normalised(e, f, k.shape[-2], mask)
    # NOTE: log(0) itself would make every gradient of a landmark without keys NaN.
    bias = torch.where(share > 0, _or_one(share).log(), -torch.inf).to(q.dtype).unsqueeze(-2)  # (..., 1, length)
    keys, values = project(e_real.to(k.dtype), k), project(f_real.to(v.dtype), v)
    return F.scaled_dot_product_attention(q, keys, values, bias.expand(*bias.shape[:-2], q.shape[-2], -1), scale=scale)


def normalised(e: Tensor, f: Tensor, n: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> Ê, F̂ (..., length, n) and r (..., length), in float32 at least: a sum in half precision is no 1."""
    e, f = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (e, f))
    e_real, f_real = e[:, :n], f[:, :n]
    if mask is not None:
        weights = key_weights(mask, e.dtype).unsqueeze(-2)  # (..., 1, n)
        e_real, f_real = e_real * weights, f_real * weights
    share = e_real.abs().sum(-1) / _or_one(e.abs().sum(-1))
    each = _or_one(share).unsqueeze(-1)
    return e_real / each, f_real / each, share


def _or_one(x: Tensor) -> Tensor:
    """x, 1 where it is 0: to be divided by."""
    return torch.where(x > 0, x, 1.0)


def key_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """w (..., n) of a mask (..., n)."""
    if mask.dtype == torch.bool:
        return mask.to(dtype)
    # Softmax does not see a shift; without it a row of float32's lowest number everywhere would have no key at all.
    top = mask.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(mask.dtype).min)
    return (mask - top).to(dtype).exp()


def project(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (..., length, n), x (..., heads, n, d) -> (..., heads, length, d). Heads that share a matrix are one
    product."""
    if x.dim() < 3 or (matrix.dim() >= 3 and matrix.shape[-3] != 1):
        return matrix @ x
    shared = matrix if matrix.dim() == 2 else matrix.squeeze(-3)
    y = shared @ side_by_side(x)
    return y.reshape(*y.shape[:-1], x.shape[-3], x.shape[-1]).transpose(-3, -2)


def side_by_side(x: Tensor) -> Tensor:
    """(..., heads, n, d) -> (..., n, heads d): as the heads came out of their linear, so most often a view."""
    return x if x.dim() < 3 else x.transpose(-3, -2).flatten(-2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, e, f, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, e, f, mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the body, run again: only its inputs were kept."""
    need = ctx.needs_input_grad
    with torch.enable_grad():
        pairs = zip(ctx.saved_tensors, need)
        inputs: list[Any] = [t if t is None else t.detach().requires_grad_(wanted) for t, wanted in pairs]
        q, k, v, e, f, mask = inputs
        y = _attend(q, k, v, e, f, mask, ctx.scale)
        grads = iter(torch.autograd.grad(y, [t for t in inputs if t is not None and t.requires_grad], dy))
    return (*(next(grads) if t is not None and t.requires_grad else None for t in inputs), None)


linformer_attention.register_autograd(_backward, setup_context=_setup_context)


def cost(
    batch: sympy.Expr, heads: int, m: sympy.Expr, n: sympy.Expr, d: int, d_v: int, length: int,
    weight_bytes: int, itemsize: int,
) -> Cost:  # fmt: skip
    """The table above for `batch` sequences, in bytes; e and f are kept in `weight_bytes`."""
    flops = 2 * batch * heads * (n + m) * length * (d + d_v)
    traffic = batch * heads * (m + n) * (d + d_v) * itemsize
    return Cost(flops, traffic + weight_bytes, weight_bytes, launches=3)
