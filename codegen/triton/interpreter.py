"""Run a @triton.jit kernel on CPU tensors, in the process that also compiles it for GPUs, with the numbers a GPU gives.

    with interpreter():
        kernel[grid](x, y, n, BLOCK=64)

Triton's own interpreter (TRITON_INTERPRET=1, before the first import) turns every kernel of the process into an
interpreted one. It also acts on the 16-bit patterns of bfloat16 as if they were integers, in products, arithmetic and
conversions, and rounds conversions to 8-bit floats wrongly: silently, with errors of 1e10. So here

    language    is patched while the context lasts and restored after it; compiling in the same process still works
    bfloat16    is computed in float32 and rounded to nearest even, as the hardware does
    numpy 2.4   refuses int(array of one element), which loop bounds are made of in triton 3.6
    libdevice   functions are torch's

About 80 microseconds a tl operation, whatever the tile: few programs, few iterations. Programs run one after the other,
so what waits for another program never ends; "the last to arrive finishes" works.

NB: this reaches into triton.runtime.interpreter, whose names hold for triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_LOCK = threading.RLock()  # triton.language is patched for the whole process: never two at once
_DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
_STORED_AS = {"bf16": torch.uint16, "fp8e4nv": torch.uint8, "fp8e5": torch.uint8}  # numpy has no such floats
_LIBDEVICE: dict[str, Callable[[Tensor], Tensor]] = {
    "erf": torch.erf, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p,
    "popc": lambda t: torch.stack([(t >> i) & 1 for i in range(32)]).sum(0), "rsqrt": torch.rsqrt, "tanh": torch.tanh,
}  # fmt: skip
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_LAUNCH_ONLY = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """While it lasts, launching a kernel interprets it. One thread at a time."""
    with _LOCK, contextlib.ExitStack() as undo:
        undo.callback(_snapshot())
        for name, method in _REPAIRS.items():
            _patch(undo, InterpreterBuilder, name, method)
        for name, function in _LIBDEVICE.items():
            if hasattr(libdevice, name):
                _patch(undo, libdevice, name, _of_libdevice(function))
        _patch(undo, JITFunction, "__call__", lambda kernel, *args, **kwargs: _interpreted(kernel)(*args, **kwargs))
        _patch(undo, JITFunction, "run", _launch)
        _patch(undo, Autotuner, "run", _launch_first)
        _patch(undo, stock, "_patch_lang_tensor", _with_index(stock._patch_lang_tensor))
        yield


def run(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """One launch: `kernel[grid](*args, **constants)` in a context of its own."""
    with interpreter():
        kernel[tuple(grid)](*args, **constants)


class _Interpreted(InterpretedFunction):
    """A device function called from another. The stock one patches the language anew and never undoes it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock._patch_lang(self.fn)  # undone by `_snapshot`
        return self.rewrite()(*args, **kwargs)


_made: dict[Any, _Interpreted] = {}  # by Python function: hashing a JITFunction walks its globals, which are patched


def _interpreted(kernel: JITFunction) -> _Interpreted:
    if kernel.fn not in _made:
        _made[kernel.fn] = _Interpreted(kernel.fn)
    return _made[kernel.fn]


def _launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
    if not warmup:
        _interpreted(kernel)[grid](*args, **{k: v for k, v in constants.items() if k not in _LAUNCH_ONLY})


def _launch_first(tuner: Autotuner, *args: Any, **constants: Any) -> Any:
    """Nothing can be timed here: the first config will do."""
    return tuner.fn.run(*args, **{**constants, **tuner.configs[0].kwargs})


def _snapshot() -> Callable[[], None]:
    """-> what puts the language back as it is now."""
    # NB: not tl.standard. The interpreter adds names to its globals that its cached, rewritten functions go on needing.
    patched = (
        tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base, tl.core.tensor_descriptor,
    )  # fmt: skip
    saved = [(owner, dict(vars(owner))) for owner in patched]

    def restore() -> None:
        for owner, before in saved:
            for name, value in list(vars(owner).items()):
                if name not in before:
                    delattr(owner, name)
                elif before[name] is not value:
                    setattr(owner, name, before[name])

    return restore


def _patch(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    absent = object()
    before = vars(owner).get(name, absent)
    setattr(owner, name, value)
    undo.callback(delattr, owner, name) if before is absent else undo.callback(setattr, owner, name, before)


# Numbers: a TensorHandle's numpy array holds bit patterns where numpy has no such float.


def _to_torch(handle: TensorHandle) -> Tensor:
    dtype = handle.dtype.scalar
    stored = torch.from_numpy(np.ascontiguousarray(handle.data))
    return (stored.view(_DTYPES[dtype.name]) if dtype.name in _STORED_AS else stored).reshape(handle.data.shape)


def _to_handle(values: Tensor, dtype: Any) -> TensorHandle:
    values = values.contiguous()
    stored = values.view(_STORED_AS[dtype.name]) if dtype.name in _STORED_AS else values
    return TensorHandle(stored.numpy(), dtype)


def _convert(handle: TensorHandle, dtype: Any) -> TensorHandle:
    """Between floats, to the nearest, ties to even."""
    return _to_handle(_to_torch(handle).to(_DTYPES[dtype.name]), dtype)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _single(handle: TensorHandle) -> TensorHandle:
    return _convert(handle, tl.float32) if _is_bfloat16(handle) else handle


def _binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
    made = _stock["binary_op"](self, _single(left), _single(right), op)
    if not _is_bfloat16(left) or op in _COMPARISONS or made.data.dtype == np.bool_:
        return made
    return _convert(made, tl.bfloat16)


def _unary_op(self: Any, value: TensorHandle, op: Any) -> TensorHandle:
    made = _stock["unary_op"](self, _single(value), op)
    return _convert(made, tl.bfloat16) if _is_bfloat16(value) else made


def _cast_impl(self: Any, value: TensorHandle, dtype: Any) -> TensorHandle:
    source, target = value.dtype.scalar, dtype.scalar
    if source.name in _DTYPES and target.name in _DTYPES:
        return _convert(value, target)
    if target == tl.bfloat16:
        return _convert(_stock["cast_impl"](self, value, tl.float32), target)
    return _stock["cast_impl"](self, _single(value), dtype)


def _create_fp_to_fp(self: Any, value: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
    if value.dtype.scalar.name in _DTYPES and dtype.scalar.name in _DTYPES:
        return _convert(value, dtype.scalar)
    return _stock["create_fp_to_fp"](self, value, dtype, rounding)


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *options: Any) -> TensorHandle:
    """Floats in float32, as tensor cores accumulate; integers exactly."""
    if not a.dtype.scalar.is_floating():
        return _stock["create_dot"](self, a, b, acc, *options)
    product = _to_torch(a).float() @ _to_torch(b).float() + _to_torch(acc).float()
    return _to_handle(product.to(_DTYPES[acc.dtype.scalar.name]), acc.dtype.scalar)


def _get_bf16(self: Any, value: float) -> TensorHandle:
    """A constant beside a bfloat16 tensor; triton 3.6 has no such method."""
    return _to_handle(torch.tensor([float(value)], dtype=torch.bfloat16), tl.bfloat16)


_REPAIRS: dict[str, Callable[..., TensorHandle]] = {
    "binary_op": _binary_op, "unary_op": _unary_op, "cast_impl": _cast_impl, "create_fp_to_fp": _create_fp_to_fp,
    "create_dot": _create_dot, "get_bf16": _get_bf16,
}  # fmt: skip
_stock = {name: getattr(InterpreterBuilder, name) for name in _REPAIRS if hasattr(InterpreterBuilder, name)}


def _of_libdevice(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def call(x: Any, _semantic: Any = None, **_: Any) -> Any:
        given = _to_torch(x.handle)
        values = function(given.float() if given.is_floating_point() else given).to(given.dtype)
        return tl.tensor(_to_handle(values, x.dtype.scalar), x.type)

    return call


def _with_index(patch: Callable[..., None]) -> Callable[..., None]:
    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    return patched


assert triton.__version__  # imported for its side effects on the language
