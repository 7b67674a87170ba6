"""Which kernel multiplies by a weight: a static rule, and a profile of measured seconds that amends it.

    int8           compressed weights: oneDNN's int8 product, on processors with VNNI
    int8_weight    the same codes, inputs in bf16: where the profile says so, for some numbers of tokens
    int4_weight    codes of 4 bits or fewer as they are stored, inputs in bf16: likewise
    bf16           weights the plan kept, where the processor multiplies bf16: they were to stay (nearly) what they are
    float          everything else: small weights, float64, processors without either

A product has three kernels at most: for one token, for a few, for more. "A few" ends at one of FEW, the same few
numbers for all products of a model, since Inductor compiles the model anew for each that is met. For large weights and
2 to 16 tokens oneDNN reorders the weight on every call: 4096 x 4096 by 4 tokens takes 2964 us in int8 and 865 us in
int8_weight, by one token 163 and 430 (2 threads of a Zen 4 EPYC, 2026-11-21).

MiniLM's products on 2 cores of a Zen 4 EPYC (AVX-512 with VNNI and bf16), 2026-11-21, one thread, 1024 tokens: int8
427 Gop/s, bf16 (packed) 209, of 474 and 237 that the instructions allow at 3.7 GHz. At 16 tokens 270 to 310 against
116 to 173, so int8 wins from few tokens on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fxcompress.cost_model.device import DeviceProfile, Target

Kernel = Literal["int8", "int8_weight", "int4_weight", "bf16", "float"]
LEAST = 1 << 14  # elements: a product with fewer is a launch, whatever its dtype; classifiers stay exact
POSITIONS = 512
FEW = (4, 16, 64)  # tokens
WINS = 0.75  # of the seconds of int8, at most: a profile is off by 10 to 15 %, and every bucket is a compilation
GROUPS = (32, 64, 128, 256)  # columns of a scale that the int4 kernel knows
_MORE = {4: (2, 4), 16: (2, 4, 16), 64: (2, 4, 16, 64)}  # tokens at which "a few" is judged
STRUCTURE = 4  # int8 is at least so much faster than float32 (427 against 105 Gop/s)


def kernel_of(elements: int, dtype: torch.dtype, compressed: bool) -> Kernel:
    """For a weight of so many elements whose product is asked in `dtype`."""
    if elements < LEAST or dtype == torch.float64:
        return "float"
    if compressed and torch.cpu._is_vnni_supported():  # without it oneDNN's int8 saturates in 16 bits
        return "int8"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float"


@dataclass(frozen=True)
class Rule:
    """What products of one model are chosen by. working_set: bytes of its weights (fxcompress.cost_model.device)."""

    profile: DeviceProfile | None = None
    target: Target = "inductor"
    working_set: float = 0


@dataclass(frozen=True)
class Bucket:
    """`kernel` for up to `tokens` tokens; None: for any number of them."""

    kernel: Kernel
    tokens: int | None


def kernels_of(
    rows: int, columns: int, dtype: torch.dtype, compressed: bool, rule: Rule, group: int | None = None
) -> tuple[Bucket, ...]:
    """By growing numbers of tokens. group: columns of a scale, where the weight is stored in 4 bits or fewer."""
    static = kernel_of(rows * columns, dtype, compressed)
    if rule.profile is None or static != "int8" or columns % 16:  # NOTE: the kernel reads past a row, 16 at a time
        return (Bucket(static, None),)
    profile = rule.profile
    weight_only: tuple[Kernel, ...] = ("int8_weight",)
    if group in GROUPS and columns % group == 0 and rows % 64 == 0:
        weight_only = (*weight_only, "int4_weight")

    def share(kernel: Kernel, tokens: tuple[int, ...]) -> float:
        """Of the seconds of int8, where it wins least."""
        given = partial(profile.product_seconds, target=rule.target, working_set=rule.working_set)
        return max(given(kernel, t, rows, columns) / given("int8", t, rows, columns) for t in tokens)

    def best(tokens: tuple[int, ...]) -> Kernel:
        other = min(weight_only, key=lambda kernel: share(kernel, tokens))
        return other if share(other, tokens) < WINS else "int8"

    found = [Bucket(best((1,)), 1)]
    few = [Bucket(kernel, most) for most in FEW if (kernel := best(_MORE[most])) != "int8"]
    found += few[-1:]
    found.append(Bucket("int8", None))
    return tuple(b for b, after in zip(found, [*found[1:], None]) if after is None or after.kernel != b.kernel)


def kernel_at(buckets: tuple[Bucket, ...], tokens: float) -> Kernel:
    """The one that runs."""
    return next(b.kernel for b in buckets if b.tokens is None or tokens <= b.tokens)


def is_two_products(rank: int, rows: int, columns: int) -> bool:
    """True if low rank is fewer multiplications than its dense matrix."""
    return rank * (rows + columns) < rows * columns


def attends_in_bf16(dtype: torch.dtype) -> bool:
    """True if attention's products go to bf16."""
    return dtype in (torch.float32, torch.bfloat16) and torch.cpu._is_avx512_bf16_supported()


def attends_in_full(positions: int) -> bool:
    """True if all scores of a head are kept: they outgrow the caches, and the memory of a feed-forward layer, later."""
    return positions <= POSITIONS


def stays_structured(multiplications: int, rows: int, columns: int) -> bool:
    """True if a structure in float32 is less time than its dense matrix in int8."""
    return STRUCTURE * multiplications < rows * columns
