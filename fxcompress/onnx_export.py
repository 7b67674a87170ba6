"""export_onnx: a compressed module as one .onnx file whose weights are still compressed.

    compiled = fxcompress.load("my-bert-4x")
    fxcompress.export_onnx(compiled, "my-bert-4x.onnx")     # opset 21, standard operators alone

What each operator of fxcompress becomes is told in fxcompress.codegen.onnx. The graph is then torch.onnx's to
translate, its constants folded only where they are sizes, and notes that the file does not need are left out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import logging
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxcompress.codegen.onnx.plain import REFUSED, ops_of, plain
from fxcompress.codegen.onnx.products import FOURS, OPSET, spell_out
from fxcompress.core.capture import export
from fxcompress.core.errors import ExportError
from fxcompress.core.signature import Signature, SignedModule
from fxcompress.exporting import check_exportable, refuse_existing_file

FOLDED = 64  # elements of a constant that may be worked out before writing: sizes, never weights
LARGEST = (1 << 31) - 1  # bytes of a protobuf message


def export_onnx(compiled: SignedModule, path: str | os.PathLike[str]) -> None:
    """Write `compiled` (of `compile`, `restructure` or `load`) as a new file, for inference, at opset 21.

    Inputs are named as the model's; those whose sizes the graph leaves open are open in the file. Outputs are named as
    the model's, too, or "output". Weights stay in their codes; needs `pip install 'fxcompress[onnx]'`.

    ONNX Runtime multiplies by codes of 4 and 8 bits with inputs rounded to 8 bits unless the session is told
    `session.qdq_matmulnbits_accuracy_level=1`. Raises `ExportError`, with the op and the modules that cannot be said.
    """
    target = refuse_existing_file(path)
    check_exportable(compiled, "export_onnx")
    _need_packages()
    _refuse(compiled)
    content = _written(_translated(compiled), compiled)
    if len(content) > LARGEST:
        raise ExportError(f"the file would have {len(content):,} bytes and ONNX files have at most {LARGEST:,}.")
    _write(target, content)


def _need_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX files need {', '.join(missing)}: pip install 'fxcompress[onnx]'.")


def _refuse(gm: SignedModule) -> None:
    """Raises `ExportError` for the ops that have no expression."""
    refused = {op: list[str]() for op in REFUSED}
    for node in gm.graph.nodes:
        for op in ops_of(node):
            if op in refused:
                refused[op].append(_owner(node))
    said = [f"{op._schema.name} at {', '.join(at)}: {REFUSED[op]}" for op, at in refused.items() if at]
    if said:
        raise ExportError(
            f"{'; '.join(said)}. Compile again with rewrites=[...] that leave it out, such as "
            "rewrites=['quantize', 'low_rank']."
        )


def _owner(node: fx.Node) -> str:
    """The module whose tensors a node reads, or the innermost one that it came from."""
    paths = [str(read.target).rpartition(".")[0] for read in node.all_input_nodes if read.op == "get_attr"]
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return next(filter(None, [*paths, *reversed(stack)]), node.name)


def _translated(compiled: SignedModule) -> Any:
    """-> onnx_ir.Model, with four-bit codes as bytes."""
    gm = compiled
    if any(t.device.type != "cpu" for t in itertools.chain(gm.parameters(), gm.buffers())):
        gm = copy.deepcopy(gm).to("cpu")
    flat = plain(gm)
    spell_out(flat)
    with torch.no_grad(), _quiet():
        program = export(flat, *flat.example())
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(_explain(flat, error)) from error
    assert made is not None
    return made.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells of packages it could also translate; nobody asked."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _explain(gm: SignedModule, error: BaseException) -> str:
    """One sentence that names the op and where the model calls it."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    text = " ".join(str(cause) for cause in causes)
    unknown = re.search(r"<OpOverload\(op='\w+\.(\w+)'", text)  # aten's, or the primitive that it is made of
    for node in gm.graph.nodes:
        if unknown and isinstance(node.target, OpOverload) and unknown[1] in node.target._opname:
            return (
                f"ONNX has no word for {node.target} at {_owner(node)}: torch.onnx {torch.__version__} does not "
                "translate it. Write that line of the model with other calls, or compress the submodule below it."
            )
    return f"torch.onnx cannot translate the graph: {str(causes[-1]).strip().splitlines()[0]}"


def _written(model: Any, compiled: SignedModule) -> bytes:
    """The model as bytes: sizes folded, four-bit codes typed, names as people know them, no notes."""
    import onnx_ir as ir
    from onnxscript import optimizer

    optimizer.optimize_ir(model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.endswith(FOURS):
            _type_fours(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        node.name = node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():  # a runtime infers them, and a small model's weights are shorter
                value.shape = value.type = None
    for value in graph.initializers.values():
        value.metadata_props.clear()
        value.shape = value.type = None  # as the tensor itself says
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "fxcompress", None, None
    _name(graph, compiled)
    return bytes(ir.to_proto(model).SerializeToString())


def _type_fours(value: Any) -> None:
    """uint8 with a code each -> uint4."""
    import ml_dtypes
    import onnx_ir as ir

    codes = value.const_value.numpy().astype(ml_dtypes.uint4)
    value.const_value = ir.Tensor(codes, dtype=ir.DataType.UINT4, name=value.name)
    value.dtype = ir.DataType.UINT4


def _name(graph: Any, compiled: SignedModule) -> None:
    """Outputs after the model's; open sizes after the first input that has them: "batch", "sequence"."""
    import onnx_ir as ir

    names = output_names(compiled)
    taken = {value.name for value in graph.inputs}
    if len(names) == len(graph.outputs):
        for name, value in zip(names, graph.outputs):
            value.name = f"{name}_output" if name in taken else name
    known = _dimension_names([(v.name, v.shape) for v in graph.inputs], compiled.signature)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, known) for dim in value.shape])
        value.metadata_props.clear()


def output_names(compiled: SignedModule) -> list[str]:
    """Of every tensor the graph answers, by its place in the answer."""
    (output,) = compiled.graph.find_nodes(op="output")
    told = [node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node)]
    assert compiled._out_spec is not None
    leaves = pytree.tree_leaves_with_path(
        pytree.tree_unflatten(list(range(compiled._out_spec.num_leaves)), compiled._out_spec)
    )
    paths = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") for path, _ in leaves]
    if len(told) != len(paths):
        return []
    tensors = [isinstance(node.meta.get("val"), Tensor) for node in told]
    names = [path if re.match(r"[A-Za-z]", path) else f"output_{path}".strip("_") for path in paths]
    return [name for name, is_tensor in zip(names, tensors) if is_tensor]


def _dimension_names(inputs: list[tuple[str, Any]], signature: Signature) -> dict[str, str]:
    """Symbol -> name: the first dimension of an input is its batch, the second of a matrix of whole numbers its
    sequence; any other size is called after its place, attention_mask_0."""
    whole = {slot.name for slot in signature.slots if slot.dtype is not None and "int" in slot.dtype}
    known: dict[str, str] = {}
    for name, shape in inputs:
        for axis, dim in enumerate(shape or ()):
            symbol, place = getattr(dim, "value", None), f"{name}_{axis}"
            common = "batch" if axis == 0 else "sequence" if axis == 1 and name in whole else place
            if isinstance(symbol, str):
                known.setdefault(symbol, place if common in known.values() else common)
    return known


def _renamed(dim: Any, known: dict[str, str]) -> Any:
    text = getattr(dim, "value", dim)
    if not isinstance(text, str):
        return dim
    return re.sub(r"[A-Za-z_]\w*", lambda found: known.get(found[0], found[0]), text)


def _write(target: Path, content: bytes) -> None:
    """Whole, or not at all."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.rename(partial, target)
    except OSError as error:
        raise ExportError(f"{target} could not be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
