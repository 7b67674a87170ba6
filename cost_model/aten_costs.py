"""What calls of aten cost. Multiply and add count as two; a transcendental function, and choosing between two, as one.

    products                            2 m n k; attention 2 queries keys (d + d_v), its scores never in memory
    each result, each element read      a number from the tables below, where floats are computed
    gathers                             no flops; what is read is as much as what is written, and the indices
    all others that are known           no flops

Every operand crosses the memory bus once and every result once, in one launch, whatever eager PyTorch makes of it: it
is the work of one good kernel a call. An op that is nowhere here costs its traffic, no flops, and a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy

from fxcompress.core.cost import Cost
from fxcompress.cost_model.calls import Call, product

Price = Callable[[Call], Cost]


def price_of(call: Call) -> Cost | None:
    """The cost of a call of aten; None where it is not known."""
    name = str(call.op._schema.name.removeprefix("aten::"))
    name = name if name in KNOWN else name.removesuffix("_")  # in place
    if name in PRODUCTS:
        return call.costs(PRODUCTS[name](call))
    if name in GATHERS:
        return call.costs(0, _gathered(call))
    if name in EACH_RESULT:
        return call.costs(EACH_RESULT[name] * call.out.elements if _floats(call) else 0)
    if name in EACH_READ and call.first is not None:
        return call.costs(EACH_READ[name] * call.first.elements if _floats(call) else 0)
    return call.costs(0) if name in FREE else None


def _floats(call: Call) -> bool:
    return call.out.dtype.is_floating_point or call.out.dtype.is_complex


def _gathered(call: Call) -> sympy.Expr:
    """A row is read for every row written."""
    table = call[GATHERS[str(call.op._schema.name.removeprefix("aten::"))]]
    indices = sympy.Add(*(array.bytes for array in call.operands if array != table))
    return 2 * call.out.bytes + indices


def _attention(call: Call) -> sympy.Expr:
    query, key, value = call["query"], call["key"], call["value"]
    return 2 * query.rows * key.sizes[-2] * (query.sizes[-1] + value.sizes[-1])


def _convolution(call: Call) -> sympy.Expr:
    """Every output is a sum over a patch; transposed, every input is spread over one."""
    transposed = "transpose" in call.op._schema.name or call.arguments.get("transposed") is True
    ends = call["input"] if transposed else call.out
    return 2 * ends.elements * product(call["weight"].sizes[1:])


def _einsum(call: Call) -> sympy.Expr:
    """Of two operands, 2 for every combination of letters; of more, as if each joined at full size."""
    letters: dict[str, Any] = {}
    names = call["equation"].split("->")[0].replace(" ", "").split(",")
    for indices, array in zip(names, call["tensors"]):
        letters.update(zip(indices, array.sizes))
    return max(1, 2 * (len(names) - 1)) * product(letters.values())


PRODUCTS: Mapping[str, Callable[[Call], sympy.Expr]] = {
    "linear": lambda c: 2 * c.out.elements * c["weight"].sizes[-1],
    "mm": lambda c: 2 * c.out.elements * c["self"].sizes[-1],
    "bmm": lambda c: 2 * c.out.elements * c["self"].sizes[-1],
    "mv": lambda c: 2 * c["self"].elements,
    "dot": lambda c: 2 * c["self"].elements,
    "matmul": lambda c: 2 * c.out.elements * c["self"].sizes[-1],
    "addmm": lambda c: 2 * c.out.elements * c["mat1"].sizes[-1],
    "baddbmm": lambda c: 2 * c.out.elements * c["batch1"].sizes[-1],
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "convolution": _convolution,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    "conv_transpose3d": _convolution,
}
GATHERS = {"embedding": "weight", "index": "self", "index_select": "self", "gather": "self"}  # op -> its table
EACH_RESULT = {
    "abs": 1, "add": 1, "addcdiv": 3, "addcmul": 3, "bernoulli": 1, "ceil": 1, "clamp": 2, "clamp_max": 1,
    "clamp_min": 1, "cos": 1, "diff": 1, "div": 1, "dropout": 2, "elu": 3, "erf": 1, "exp": 1, "exp2": 1, "expm1": 1,
    "floor": 1, "fmod": 1, "gelu": 5, "hardsigmoid": 4, "hardswish": 5, "hardtanh": 2, "leaky_relu": 2, "lerp": 3,
    "log": 1, "log1p": 1, "log2": 1, "maximum": 1, "minimum": 1, "mish": 5, "mul": 1, "neg": 1, "outer": 1, "pow": 1,
    "reciprocal": 1, "relu": 1, "relu6": 2, "remainder": 1, "round": 1, "rsqrt": 1, "rsub": 1, "sigmoid": 4, "sign": 1,
    "silu": 4, "sin": 1, "softplus": 3, "sqrt": 1, "square": 1, "sub": 1, "tan": 1, "tanh": 1, "trunc": 1,
    "upsample_bilinear2d": 8, "upsample_nearest2d": 0,
}  # fmt: skip
EACH_READ = {
    "_log_softmax": 5, "_native_batch_norm_legit_no_training": 4, "_softmax": 5, "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 1, "adaptive_max_pool2d": 1, "amax": 1, "amin": 1, "avg_pool1d": 1, "avg_pool2d": 1,
    "batch_norm": 4, "cumprod": 1, "cumsum": 1, "group_norm": 7, "instance_norm": 7, "layer_norm": 7,
    "linalg_vector_norm": 2, "log_softmax": 5, "logsumexp": 4, "max": 1, "max_pool1d": 1, "max_pool2d": 1,
    "max_pool2d_with_indices": 1, "mean": 1, "min": 1, "native_batch_norm": 4, "native_group_norm": 7,
    "native_layer_norm": 7, "norm": 2, "prod": 1, "rms_norm": 4, "softmax": 5, "std": 4, "sum": 1, "var": 4,
    "var_mean": 4,
}  # fmt: skip
FREE = frozenset((  # of floating-point work: copies, comparisons, masks, new tensors
    "__and__", "__or__", "__xor__", "_to_copy", "_unsafe_view", "all", "any", "arange", "argmax", "argmin", "argsort",
    "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "cat", "clone", "concat", "constant_pad_nd",
    "contiguous", "copy", "empty", "empty_like", "eq", "expand_as", "fill", "flatten", "flip", "full", "full_like",
    "ge", "gt", "hstack", "im2col", "index_copy", "index_put", "isfinite", "isin", "isinf", "isnan", "le", "lift_fresh",
    "lift_fresh_copy", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "masked_fill",
    "masked_scatter", "ne", "new_empty", "new_full", "new_ones", "new_zeros", "nonzero", "one_hot", "ones",
    "ones_like", "pad", "pixel_shuffle", "pixel_unshuffle", "rand", "rand_like", "randn", "randn_like", "repeat",
    "repeat_interleave", "reshape", "roll", "scalar_tensor", "scatter", "slice_scatter", "sort", "stack", "to", "topk",
    "tril", "triu", "type_as", "unflatten", "vstack", "where", "zeros", "zeros_like", "zero",
))  # fmt: skip
KNOWN = frozenset((*PRODUCTS, *GATHERS, *EACH_RESULT, *EACH_READ, *FREE))
