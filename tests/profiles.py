"""A made-up device: products at round rates, every pass the same. Its seconds can be told by hand."""

import itertools

from fxcompress.cost_model.device import DeviceProfile, Grid

# Multiplications and additions a second.
RATES = {"float": 1e11, "bf16": 2e11, "int8": 4e11, "int8_weight": 1e11, "int4_weight": 1e11}
LAUNCH = 2e-6  # of a product
TOKENS, FEATURES, ROWS, COLUMNS = (1, 16, 256, 4096), (16, 256, 4096), (1, 64, 4096), (16, 256, 4096)
PASSES = ("add", "mul", "tanh", "gelu", "quick_gelu", "cast", "copy", "norm", "softmax", "round", "scale",
          "embedding", "gather")  # fmt: skip
ATTENTION = ("flash", "flash_masked", "flash_causal", "products_float", "products_bf16")


def grid(axes, seconds):
    return Grid(axes, tuple(seconds(*at) for at in itertools.product(*axes)))


def product(rate):
    return grid((TOKENS, FEATURES, FEATURES), lambda m, n, k: LAUNCH + 2 * m * n * k / rate)


def profile(**rates):
    """rates: op/s of some kernels, in place of RATES."""
    return DeviceProfile(
        device="made up",
        threads=1,
        versions={"torch": "0"},
        date="2026-11-21",
        cache_bytes=32 << 20,
        products={name: (product(rate),) * 2 for name, rate in {**RATES, **rates}.items()},
        passes={
            f"{target}.{name}": grid((ROWS, COLUMNS), lambda r, c: 1e-6 + r * c * 1e-10)
            for target in ("eager", "inductor") for name in PASSES
        },
        attention={name: grid((TOKENS, TOKENS, (16, 64)), lambda h, p, s: 1e-6 + 4 * h * p * p * s / 1e11)
                   for name in ATTENTION},
        overheads={"eager.call": 2e-5, "inductor.call": 2e-5, "eager.view": 1e-6, "eager.attribute": 1e-7,
                   "inductor.kernel": 1e-6,
                   "inductor.alone": 3e-5},
        fused=Grid(((64, 65536),), (0.5, 0.5)),
        error=(0.05, 0.1),
    )  # fmt: skip
