"""nn.Module + example inputs -> ATen GraphModule with the real weights, dynamic batch and sequence.

torch.export traces the model once (non-strict). Dimension 0 of every input, and dimension 1 of inputs with two or three
dimensions (token ids, masks, features), are left to torch.export to make dynamic where the model allows it; a single
example is doubled along the batch first, because torch.export would take a size of 1 for a constant. Output classes
come back as the model made them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.core.errors import CaptureError, InputError, NonFiniteError
from fxcompress.core.experts import spell_out
from fxcompress.core.modes import remember, switch
from fxcompress.core.signature import Signature, SignedModule

Inputs = tuple[Any, ...] | dict[str, Any]

_NOISE = (torch.ops.aten._assert_tensor_metadata.default,)  # checks of the tracer's own making; they compute nothing
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[1]))


def capture(model: nn.Module, inputs: Inputs, trainable: bool = False) -> SignedModule:
    """The graph of `model` in eval mode. Shares the model's tensors; the model itself is not changed.

    `gm.meta["signature"]` holds how it may be called. A `trainable` graph also knows its training mode (`.train()`
    turns its dropout on). Raises `CaptureError` with the model's line where tracing fails.
    """
    check_finite(model)
    args, kwargs = split_inputs(inputs)
    if not pytree.tree_leaves((args, kwargs)):
        raise CaptureError("example_inputs is empty: give a tuple of positional or a dict of keyword inputs.")
    with _as_exported(model, training=False):
        args, kwargs = _double_single_batch(model, args, kwargs)
        _register_dataclasses(model, args, kwargs)
        program = _export(model, args, kwargs) if not trainable else None
    if program is None:
        with _as_exported(model, training=True):
            program = _export(model, args, kwargs)
    gm = unlift(program)
    if trainable:
        remember(gm.graph)
        gm.eval()
    order = tuple(inspect.signature(model.forward).parameters)
    gm.meta["original_bytes"] = _state_bytes(model)
    gm.meta["signature"] = Signature.of(gm, program.range_constraints, order, pytree.tree_leaves((args, kwargs)))
    _refuse_data_dependent_outputs(model, gm)
    return gm


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        return export(model, args, kwargs)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One batch as a user gives it -> (args, kwargs): a dict is keywords, a tuple or list positions, a tensor one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def example_of(model: nn.Module) -> Inputs:
    """Inputs for a Hugging Face model, made from its own description; a clear error for any other model."""
    own = getattr(model, "dummy_inputs", None)
    main = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if own is None or main is None or config is None:
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs cannot be guessed: "
            "pass example_inputs=(x,) or example_inputs={'x': x}, or calibration batches."
        )
    accepts = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)
        }
    if "input_ids" not in own:
        return dict(own)
    vocab = getattr(config.get_text_config(), "vocab_size", 32)
    ids = (torch.arange(2 * 11).reshape(2, 11) * 7 + 3) % vocab
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "type_vocab_size", 0):  # segments, as in BERT; GPT-2 takes the name for another thing
        made["token_type_ids"] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids[:, :7].clone()
    return {name: value for name, value in made.items() if name in accepts}


def check_finite(model: nn.Module) -> None:
    """Every floating parameter and buffer must be finite: one NaN would spread through every statistic."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # NOTE: masks are kept as buffers full of -inf in many decoders; only parameters must be finite.
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"weight {name!r} holds {bad} NaN or infinite of {tensor.numel()} values; "
                "repair or reload the model first."
            )


def recapture(gm: SignedModule) -> torch.export.ExportedProgram:
    """The graph back through torch.export, in eval mode, for saving; the call checks stay out of it."""
    twin = gm.copy()
    switch(twin.graph, training=False)
    plain = fx.GraphModule(twin, twin.graph)
    return export(plain, *gm.example())


def export(gm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """torch.export with the dynamic dimensions described above."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own deprecation notes, not the user's business
        return torch.export.export(gm, args, kwargs, dynamic_shapes=_dynamic(gm, args, kwargs), strict=False)


def unlift(program: torch.export.ExportedProgram) -> SignedModule:
    """ExportedProgram -> GraphModule with weights as attributes again; `meta["signature"]` is the caller's to set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = program.module(check_guards=False)
    gm = SignedModule(exported, exported.graph)
    spell_out(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target in _NOISE:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.eval()
    return gm


@contextlib.contextmanager
def _as_exported(model: nn.Module, training: bool) -> Iterator[None]:
    """One mode and no key-value cache (it is neither a tensor nor an answer) while tracing; restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    own: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in own if getattr(c, "use_cache", False) is True}
    try:
        for module, _ in modes:
            module.training = training
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config in configs.values():
            config.use_cache = True


def _dynamic(gm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    auto = torch.export.Dim.AUTO

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        return {0: auto, 1: auto} if leaf.dim() in (2, 3) else {0: auto}

    shapes = pytree.tree_map(of, kwargs)
    if not args:
        return shapes
    positional = [pytree.tree_map(of, a) for a in args]
    names = list(inspect.signature(gm.forward).parameters)
    if kwargs:
        return {**dict(zip(names, positional)), **shapes}
    return tuple(positional)


def _double_single_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return args, kwargs
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    try:
        with torch.no_grad():
            model(*doubled[0], **doubled[1])
    except Exception:  # the first dimension is no batch
        return args, kwargs
    return doubled


def _register_dataclasses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell pytree about a dataclass the model returns; torch.export refuses classes it cannot take apart."""
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    except Exception:  # the export below fails the same way, and says where
        return
    kind = type(output)
    if dataclasses.is_dataclass(output) and kind not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


def _state_bytes(model: nn.Module) -> int:
    """Bytes of the distinct tensors of the model's state_dict: what its own checkpoint holds."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _refuse_data_dependent_outputs(model: nn.Module, gm: fx.GraphModule) -> None:
    (output,) = gm.graph.find_nodes(op="output")
    for index, node in enumerate(pytree.tree_leaves(output.args[0])):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        sizes = [*value.shape] if isinstance(value, Tensor) else [value] if isinstance(value, torch.SymInt) else []
        unbacked = [str(s) for s in sizes if isinstance(s, torch.SymInt) and str(s.node.expr).startswith("u")]
        if unbacked:
            raise CaptureError(
                f"output {index} of {type(model).__name__} has a size that depends on the data ({', '.join(unbacked)})"
                f"{_line_of(node)}; return a tensor whose shape follows from the shapes of the inputs."
            )


def _line_of(node: fx.Node) -> str:
    trace = node.meta.get("stack_trace") or ""
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return f", at {places[-1]}" if places else ""


def _explain(model: nn.Module, error: Exception) -> str:
    """One sentence that names the model's own line: the innermost frame outside torch and fxcompress."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_OWN) and not f.filename.startswith("<")]
    where = f' at File "{own[-1].filename}", line {own[-1].lineno}: {own[-1].line}' if own else ""
    if isinstance(error, TypeError) and not where:
        raise InputError(f"example inputs do not fit {type(model).__name__}.forward: {first}")
    return (
        f"torch.export cannot capture {type(model).__name__}{where}: {first} "
        "Rewrite that line without data-dependent Python control flow, or compress the submodule below it."
    )
