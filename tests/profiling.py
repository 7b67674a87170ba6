"""Profiles by formula, for tests: seconds anybody can check, and none measured."""

import itertools

import torch

from fxcompress.codegen.cpu.between import COMPILED, PASSES
from fxcompress.cost_model.device import PRODUCTS, DeviceProfile, Grid, device_name, versions

AXES = ((1, 16, 17, 256), (64, 1024), (64, 1024))
RATES = {"float": 4.0, "bf16": 2.0, "int8": 1.0, "int8_weight": 1.0, "int4_weight": 1.0}


OVERHEADS = {name: (seconds,) * 3 for name, seconds in {
    "eager.call": 1e-5, "inductor.call": 1e-5, "eager.input": 1e-7, "inductor.input": 1e-7, "eager.view": 1e-6,
    "eager.attribute": 1e-6, "inductor.attribute": 1e-7, "inductor.kernel": 1e-6,
}.items()}  # fmt: skip
ATTENTION = ("flash", "flash_masked", "flash_causal", "products_float", "products_bf16", "compiled", "compiled_short")


def grid(axes, seconds):
    return Grid(axes, tuple(seconds(*at) for at in itertools.product(*axes)))


def by_formula(rates=RATES, few=(), **changes):
    """A product takes rate x tokens x rows x columns picoseconds; kernels of `few` half of that up to 16 tokens."""

    def product(kernel, level):
        def seconds(m, n, k):
            share = (0.5 if kernel in few and m <= 16 else 1) * (2 if level == 2 else 1)
            return rates[kernel] * share * m * n * k * 1e-12

        return grid(AXES, seconds)

    one = grid(((1, 1024), (64, 1024)), lambda r, c: r * c * 1e-12)
    heads = grid(((1, 64), (1, 128), (16, 64)), lambda h, p, s: h * p * p * s * 1e-12)
    fields = {
        "device": device_name(), "threads": torch.get_num_threads(), "versions": versions(), "date": "2026-11-21",
        "caches": (1 << 21, 1 << 25), "products": {k: tuple(product(k, level) for level in range(3)) for k in PRODUCTS},
        "passes": {f"eager.{n}": one for n in PASSES} | {f"inductor.{n}": one for n in COMPILED},
        "attention": dict.fromkeys(ATTENTION, heads),
        "overheads": OVERHEADS,
        "fused": Grid(((64, 65536),), (1.0, 0.5)), "error": (0.05, 0.2), "pulse": {"product": 1e-5},
    }  # fmt: skip
    return DeviceProfile(**{**fields, **changes})


SPEEDS = {"float": 1e11, "bf16": 2e11, "int8": 4e11, "int8_weight": 1e11, "int4_weight": 1e11}  # op/s
LAUNCH = 2e-6  # of a product
TOKENS, FEATURES, ROWS, COLUMNS = (1, 16, 256, 4096), (16, 256, 4096), (1, 64, 4096), (16, 256, 4096)


def profile(**speeds):
    """A made-up device where calls have launches, too. speeds: op/s of some kernels, in place of SPEEDS."""

    def product(speed):
        return grid((TOKENS, FEATURES, FEATURES), lambda m, n, k: LAUNCH + 2 * m * n * k / speed)

    one = grid((ROWS, COLUMNS), lambda r, c: 1e-6 + r * c * 1e-10)
    heads = grid((TOKENS, TOKENS, (16, 64)), lambda h, p, s: 1e-6 + 4 * h * p * p * s / 1e11)
    plain = by_formula()
    return by_formula(
        device="made up", threads=1, versions={"torch": "0"}, error=(0.05, 0.1),
        products={name: (product(speed),) * 3 for name, speed in {**SPEEDS, **speeds}.items()},
        passes=dict.fromkeys(plain.passes, one), attention=dict.fromkeys(plain.attention, heads),
        overheads={**plain.overheads, "eager.call": (2e-5,) * 3, "inductor.call": (2e-5,) * 3,
                   "eager.attribute": (1e-7,) * 3},
        fused=Grid(((64, 65536),), (0.5, 0.5)),
    )  # fmt: skip
