"""Save and load without pickle.

    model.safetensors    every tensor the graph reads, by attribute path
    graph.json.xz        the graph: torch.export's own JSON schema (torch._export.serde), without stack traces
    plan.json.xz         the plan with all candidates (fxcompress.core.plan), and the report
    fxcompress.json      format, versions, how the graph may be called, and length and SHA-256 of the other three

A folder is written beside its target and renamed into place, so a killed save leaves the old folder or the new one.
Loading checks every length and hash before it parses anything, needs no code of the original model, and gives back the
same bits.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import itertools
import json
import logging
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch._export.serde import serialize as serde
from torch._export.serde.schema import ExportedProgram as Program
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxcompress.codegen.costs import cost_of
from fxcompress.codegen.cpu.module import LoweredModule
from fxcompress.codegen.triton.listing import list_kernels
from fxcompress.core.capture import recapture, unlift
from fxcompress.core.errors import CheckpointError, FxcompressError
from fxcompress.core.new_folder import new_folder, refuse_existing
from fxcompress.core.plan import Plan
from fxcompress.core.signature import Signature, SignedModule
from fxcompress.core.site import attribute
from fxcompress.report import Report, RestructureReport

log = logging.getLogger("fxcompress.checkpoint")

FORMAT = 1
MANIFEST, TENSORS, GRAPH, PLAN = "fxcompress.json", "model.safetensors", "graph.json.xz", "plan.json.xz"
# A little over what BERT and Llama need.
BYTES_A_NODE = 25  # in graph.json.xz
BYTES_A_SITE = 500  # in the header of model.safetensors and in the report
MAX_GRAPH_BYTES = 1 << 30  # unpacked; a larger one is no graph of ours


def save(compiled: SignedModule, folder: str | os.PathLike[str]) -> None:
    """Write `compiled` (what `compile`, `restructure` or `load` returned) as a new folder, in eval mode.

    Nothing is overwritten. Raises `CheckpointError`.
    """
    refuse_existing(Path(folder))
    if isinstance(compiled, LoweredModule):
        raise CheckpointError(
            "a lowered module fits this machine alone; save the compiled one, and lower it after loading."
        )
    if not isinstance(compiled, SignedModule) or "report" not in compiled.meta:
        raise CheckpointError(
            f"save takes what fxcompress.compile or restructure returned, not a {type(compiled).__name__}."
        )
    with new_folder(Path(folder)) as partial:
        for name, content in _files(compiled).items():
            (partial / name).write_bytes(content)


def load(folder: str | os.PathLike[str]) -> SignedModule:
    """Read a folder `save` wrote: the same module, bit for bit, with `.plan`, `.report`. Raises `CheckpointError`."""
    source = Path(folder)
    manifest = _manifest(source)
    contents = {name: _checked(source, name, entry) for name, entry in manifest["files"].items()}
    try:
        tensors = safetensors.torch.load(contents[TENSORS])
        for alias, name in manifest["aliases"].items():
            tensors[alias] = tensors[name]
        gm = _graph(_unpack(contents[GRAPH]), tensors)
        told = json.loads(_unpack(contents[PLAN]))
        signature = Signature.from_json(manifest["signature"])
        if told["plan"] is None:
            gm.meta.update(
                signature=signature, report=RestructureReport.from_json(told["report"]), kernels=list_kernels,
                cost=cost_of,
            )
            return gm
        plan = Plan.from_json(told["plan"])
        report = Report.from_json({**told["report"], "measured_bytes": int(manifest["measured_bytes"])})
        return attach(gm, signature, plan, report)
    except FxcompressError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} is damaged or was written by another version: {type(error).__name__}: {error}"
        ) from error


def attach(gm: SignedModule, signature: Signature, plan: Plan, report: Report) -> SignedModule:
    """Give a graph its plan and report, and the call checks."""
    gm.meta.update(signature=signature, plan=plan, report=report, kernels=list_kernels, cost=cost_of)
    return gm


def bytes_on_disk(compiled: SignedModule) -> int:
    """What `save` will write, all files together."""
    return sum(len(content) for content in _files(compiled).values())


def predicted_overhead(original: SignedModule, plan: Plan) -> int:
    """The same before anything is rewritten, by nodes and sites; where it falls short, `compile` chooses again."""
    return (
        len(_pack(plan.to_text().encode()))
        + BYTES_A_NODE * len(original.graph.nodes)
        + BYTES_A_SITE * len(plan.sites)
        + 2_000
    )


def _files(gm: SignedModule) -> dict[str, bytes]:
    """Every file's content, the manifest last; whatever device it is on, it is written for a CPU."""
    if any(tensor.device.type != "cpu" for tensor in itertools.chain(gm.parameters(), gm.buffers())):
        gm = copy.deepcopy(gm).to("cpu")
    tensors, aliases = _tensors(gm)
    files = {
        TENSORS: safetensors.torch.save(tensors),
        GRAPH: _pack(_program(gm)),
        PLAN: _pack(_told(gm)),
    }
    manifest = {
        "format": FORMAT,
        "torch": torch.__version__,
        "files": {n: {"bytes": len(c), "sha256": _sha256(c)} for n, c in files.items()},
        "aliases": aliases,
        "signature": gm.signature.to_json(),
        "measured_bytes": f"{getattr(gm.report, 'measured_bytes', 0):015d}",
    }
    own = {"sha256": _sha256(json.dumps(manifest).encode())}
    return {**files, MANIFEST: json.dumps({**manifest, **own}).encode()}


def _told(gm: SignedModule) -> bytes:
    """Plan and report; no plan where `restructure` was told what to do.

    measured_bytes is left to the manifest, at a fixed width: a compressed file must not hold its own size.
    """
    told = {k: v for k, v in gm.report.to_json().items() if k != "measured_bytes"}
    plan = gm.meta["plan"].to_text() if "plan" in gm.meta else "null"
    return f'{{"plan": {plan}, "report": {json.dumps(told)}}}'.encode()


def _tensors(gm: SignedModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (distinct tensors by path, second names of the same tensor)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        tensor = attribute(gm, path)
        name = first.setdefault(id(tensor), path)
        if name == path:
            tensors[path] = tensor.detach().contiguous()
        else:
            aliases[path] = name
    return tensors, aliases


def _program(gm: SignedModule) -> bytes:
    """The graph as JSON. serde would also pack the tensors with torch.save; it is handed empty ones."""
    program = recapture(gm)
    for node in program.graph.nodes:  # source lines of a model that will not be there
        for key in ("stack_trace", "nn_module_stack", "torch_fn", "from_node", "source_fn_stack"):
            node.meta.pop(key, None)
    program._state_dict = {name: _hollow(tensor) for name, tensor in program.state_dict.items()}
    program._constants = {name: _hollow(tensor) for name, tensor in program.constants.items()}
    program._example_inputs = None
    return serde.serialize(program).exported_program


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype)
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty


def _graph(text: bytes, tensors: Mapping[str, Tensor]) -> SignedModule:
    schema = serde._dict_to_dataclass(Program, _known_types(json.loads(text)))  # type: ignore[no-untyped-call]
    kinds = {InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR}
    specs = schema.graph_module.signature.input_specs
    parameters = {spec.value.parameter_name for spec in specs if spec.type == "parameter"}
    state = {n: torch.nn.Parameter(t, requires_grad=False) if n in parameters else t for n, t in tensors.items()}
    program = serde.ExportedProgramDeserializer().deserialize(schema, state, state, None)
    wanted = {s.target for s in program.graph_signature.input_specs if s.kind in kinds}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(f"{TENSORS} lacks {len(missing)} tensors the graph reads, such as {missing[0]!r}.")
    return unlift(program)


def _known_types(program: Any) -> Any:
    """Output classes of a library that is not here become dictionaries with the same keys: answers matter more.

    transformers is imported where a class of its own is asked for; nothing else a checkpoint names ever is.
    """
    for entry in program["graph_module"]["module_call_graph"]:
        signature = entry.get("signature")
        if signature is not None:
            version, spec = json.loads(signature["out_spec"])
            signature["out_spec"] = json.dumps([version, _plain(spec)])
    return program


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    kind = spec["type"]
    if kind is not None and kind.startswith("transformers.") and importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.modeling_outputs")
    if kind is not None and kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        context = json.loads(spec["context"])
        # a dataclass keeps (set, unset) fields
        keys = context[0] if context and isinstance(context[0], list) else context
        log.warning("%s is not available here; outputs are dictionaries with the same keys: %s", kind, ", ".join(keys))
        spec = {**spec, "type": "builtins.dict", "context": json.dumps(keys)}
    return {**spec, "children_spec": [_plain(child) for child in spec["children_spec"]]}


def _manifest(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder; give the one fxcompress.save wrote.")
    path = source / MANIFEST
    if not path.is_file() and (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} holds no {MANIFEST} but a config.json, so it is no fxcompress checkpoint: it is a transformers "
            "folder; load it with from_pretrained."
        )
    if not path.is_file():
        raise CheckpointError(f"{source} holds no {MANIFEST}, so it is no fxcompress checkpoint.")
    try:
        manifest = json.loads(path.read_bytes())
        assert isinstance(manifest, dict)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads format {FORMAT}.")
        stated = manifest.pop("sha256")
        assert _sha256(json.dumps(manifest).encode()) == stated
        assert set(manifest["files"]) == {TENSORS, GRAPH, PLAN}
        assert {"aliases", "signature", "measured_bytes"} <= set(manifest)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged; compress the model again or restore the file.") from error
    return manifest


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checked(source: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    try:
        content = (source / name).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{source / name} is missing or unreadable ({error.strerror}); restore the folder."
        ) from error
    if len(content) != entry["bytes"]:
        raise CheckpointError(
            f"{source / name} has {len(content)} bytes where {entry['bytes']} were written: "
            "it is truncated; restore it."
        )
    if _sha256(content) != entry["sha256"]:
        raise CheckpointError(f"{source / name} was changed after it was written (SHA-256 differs); restore it.")
    return content


def _pack(content: bytes) -> bytes:
    return lzma.compress(content, preset=9)


def _unpack(content: bytes) -> bytes:
    unpacker = lzma.LZMADecompressor(memlimit=1 << 30)
    text = unpacker.decompress(content, MAX_GRAPH_BYTES)
    if not unpacker.eof:
        raise CheckpointError(f"a compressed file is cut short, or unpacks to more than {MAX_GRAPH_BYTES} bytes.")
    return text
