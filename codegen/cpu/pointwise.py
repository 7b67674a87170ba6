"""What stands between the products and would cost as much as they do: GELU and attention of few positions.

gelu        x Phi(x), with Phi(x) ~ sigmoid(x (G_0 + G_1 u + G_2 u^2)), u = min(x^2, 36)

    |gelu - exact| <= 3e-5 everywhere: least maximum error, by reweighted least squares. What follows is rounded to 255
    steps of the row's range; where that is 0.02 or more, a step is larger than this error. The sigmoid is for Inductor
    too: on a CPU it computes what holds one once, where it would compute erf a second time when it rounds the row.

attention   softmax(q k^T scale + mask) v by two bf16 products, the softmax between them in float32; by two float32
            products for one short sequence, where starting oneDNN costs more than the product

    One thread, 8 x 12 heads of 128 x 32, Zen 4, 2026-11-21: bf16 products 1.0 ms and the softmax fused into what
    surrounds it, against 4.2 ms of PyTorch's flash kernel in float32 and 4.8 ms in bf16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.cpu.rules import attends_in_float, attends_in_full


def gelu(x: Tensor) -> Tensor:
    """The exact form's approximation above, in float32."""
    wide = x.float()
    u = (wide * wide).clamp_max(36.0)  # NOTE: numbers by name would be inputs to Dynamo, read for every 16 elements
    return (wide * torch.sigmoid(wide * ((u * -0.00070303303 + 0.074011296) * u + 1.5950157642))).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """scaled_dot_product_attention of (batch, heads, positions, size), without dropout and causality.

    mask: what is added to the scores.
    """
    if not attends_in_full(k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    batch, heads, positions, size = q.shape
    factor = 1 / math.sqrt(size) if scale is None else scale
    dtype = torch.float32 if attends_in_float(batch, k.shape[2]) else torch.bfloat16
    left, right, values = (t.to(dtype).reshape(batch * heads, t.shape[2], t.shape[3]) for t in (q * factor, k, v))
    scores = torch.bmm(left, right.transpose(1, 2)).float().reshape(batch, heads, positions, k.shape[2])
    scores = scores if mask is None else scores + mask
    shares = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    total = shares.sum(-1, keepdim=True).clamp_min(1e-30)  # rows without a key give zeros, as in PyTorch's
    mixed = torch.bmm(shares.to(dtype).reshape(batch * heads, positions, k.shape[2]), values)
    return (mixed.float().reshape(batch, heads, positions, v.shape[3]) / total).to(q.dtype)


def additive(mask: Tensor) -> Tensor:
    """0 where a boolean mask holds, -inf elsewhere.

    NOTE: the exp is for Inductor, which on a CPU computes what holds one once for all its readers. Without it every
    layer's softmax makes the mask anew from its indices, number by number: 4.8 ms a layer of 8 x 12 x 128 x 128 where
    the softmax itself is 1.4 ms (one thread, Zen 4).
    """
    return -torch.where(mask, -torch.inf, torch.inf).exp()
