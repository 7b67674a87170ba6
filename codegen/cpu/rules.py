"""Which kernel multiplies by a weight: one static rule, where a table of measured seconds can take its place.

    int8     compressed weights: oneDNN's int8 product, on processors with VNNI
    bf16     weights the plan kept, where the processor multiplies bf16: they were to stay (nearly) what they are
    float    everything else: small weights, float64, processors without either

MiniLM's products on 2 cores of a Zen 4 EPYC (AVX-512 with VNNI and bf16), 2026-11-21, one thread, 1024 tokens: int8
427 Gop/s, bf16 (packed) 209, of 474 and 237 that the instructions allow at 3.7 GHz. At 16 tokens 270 to 310 against
116 to 173, so int8 wins from few tokens on.
"""

from __future__ import annotations

from typing import Literal

import torch

Kernel = Literal["int8", "bf16", "float"]
LEAST = 1 << 14  # elements: a product with fewer is a launch, whatever its dtype; classifiers stay exact
POSITIONS = 512
SHORT = 32
STRUCTURE = 4  # int8 is at least so much faster than float32 (427 against 105 Gop/s)


def kernel_of(elements: int, dtype: torch.dtype, compressed: bool) -> Kernel:
    """For a weight of so many elements whose product is asked in `dtype`."""
    if elements < LEAST or dtype == torch.float64:
        return "float"
    if compressed and torch.cpu._is_vnni_supported():  # without it oneDNN's int8 saturates in 16 bits
        return "int8"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float"


def attends_in_bf16(dtype: torch.dtype) -> bool:
    """True if attention's products go to bf16."""
    return dtype in (torch.float32, torch.bfloat16) and torch.cpu._is_avx512_bf16_supported()


def attends_in_full(positions: int) -> bool:
    """True if all scores of a head are kept: they outgrow the caches, and the memory of a feed-forward layer, later."""
    return positions <= POSITIONS


def attends_in_float(batch: int, positions: int) -> bool:
    """True if attention's products stay in float32: 12 heads of 16 x 32 are 5 us each, in bf16 17 (2 threads, Zen 4).

    Only of a batch of one, which has a graph of its own anyway; a longer sequence then has another.
    """
    return batch == 1 and positions <= SHORT


def stays_structured(multiplications: int, rows: int, columns: int) -> bool:
    """True if a structure in float32 is less time than its dense matrix in int8."""
    return STRUCTURE * multiplications < rows * columns
