"""Compressed leaves as JSON, and back, without their tensors: what a Hugging Face folder says of them in config.json.

    "encoder.layer.0.attention.self.query": {
      "rewrite": "quantize{bits=4, group_size=64}",
      "tensors": {"codes": "uint8 384x192", "scales": "float16 384x6", ...},
      "sha256": "..."
    }

Reading it executes nothing: a rewrite is parsed, sizes are checked, and tensors are made on meta for a loader to fill.
A module that reads weights back (fxcompress.read_back) has such an entry for each: {"read_back": {"in_proj": ...}}.
Leaves of the same content, such as a table and the head tied to it, name the first: {"same_as": "embed_tokens"}.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.core.errors import CheckpointError, FxcompressError
from fxcompress.leaves import Compressed, hollow, native_of, swap
from fxcompress.passes import REWRITES
from fxcompress.passes.recipe import parse
from fxcompress.read_back import Reader, ReadsBack, install

DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)}


def describe(model: nn.Module) -> dict[str, Any]:
    """What `hollowed` needs to put the compressed leaves of `model` into an uncompressed one, by path."""
    found: dict[str, Any] = {}
    first: dict[tuple[str, str], str] = {}
    for path, leaf in model.named_modules(remove_duplicate=False):
        if isinstance(leaf, Compressed):
            key = leaf.spec, digest(leaf)
            if key in first:
                found[path] = {"same_as": first[key]}
                continue
            first[key] = path
            sizes = {name: _type_of(tensor) for name, tensor in leaf.tensors.items()}
            found[path] = {"rewrite": leaf.spec, "tensors": sizes, "sha256": key[1]}
        elif isinstance(leaf, ReadsBack):
            found[path] = {"read_back": {name: _entry(leaf, name, reader) for name, reader in leaf.readers.items()}}
    return found


def _entry(module: ReadsBack, name: str, reader: Reader) -> dict[str, Any]:
    tensors = {key: getattr(module, f"{name}_{key}") for key in reader.names}
    sizes = {key: _type_of(tensor) for key, tensor in tensors.items()}
    matrix = f"{reader.rows}x{reader.columns}"
    return {
        "rewrite": reader.spec, "matrix": matrix, "turned": reader.turned, "tensors": sizes, "sha256": _hash(tensors),
    }  # fmt: skip


def hollowed(model: nn.Module, told: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Swap the leaves of `model` in place, with tensors on meta -> the weights of those that share tensors, by path:
    these leaves have none until `share`.

    Raises `CheckpointError` where the description does not fit the model.
    """
    waiting: dict[str, nn.Parameter] = {}
    for path, leaf in told.items():
        if "read_back" in leaf:
            _hollow_read_back(model, path, leaf["read_back"])
            continue
        module = _module(model, path)
        if isinstance(module, Compressed):
            continue  # the same module at a second path
        if "same_as" in leaf:
            weight = module._parameters.pop("weight")
            assert weight is not None
            waiting[path] = nn.Parameter(hollow(weight), requires_grad=False)
            continue
        try:
            tensors = {str(name): _empty(text) for name, text in leaf["tensors"].items()}
            swap(module, parse(leaf["rewrite"], REWRITES), tensors)
        except (FxcompressError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the folder keeps {path} as {leaf.get('rewrite')!r}, which does not fit a {type(module).__name__} of "
                f"{_shape(module)} ({str(error).splitlines()[0]}): config.json is damaged, or of another model."
            ) from error
    return waiting


def _hollow_read_back(model: nn.Module, path: str, told: Mapping[str, Any]) -> None:
    try:
        module = model.get_submodule(path)
        for name, entry in told.items():
            weight, (rows, columns) = module._parameters[name], map(int, entry["matrix"].split("x"))
            assert weight is not None
            reader = Reader(entry["rewrite"], rows, columns, tuple(weight.shape), entry["turned"] is True, weight.dtype)
            install(module, name, reader, {str(key): _empty(text) for key, text in entry["tensors"].items()})
            if rows * columns != weight.numel():
                raise ValueError(f"a matrix of {entry['matrix']} is no weight of {tuple(weight.shape)}")
    except (FxcompressError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"the folder says what {path} reads back, which does not fit {type(model).__name__} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): config.json is damaged, or of "
            "another model."
        ) from error


def share(model: nn.Module, told: Mapping[str, Any], waiting: Mapping[str, nn.Parameter]) -> None:
    """Give each leaf of `waiting`, which `hollowed` returned, the tensors of the leaf that it names."""
    for path, weight in waiting.items():
        module, owner = model.get_submodule(path), model.get_submodule(told[path]["same_as"])
        assert isinstance(owner, Compressed)
        module.register_parameter("weight", weight)
        swap(module, parse(owner.spec, REWRITES), owner.tensors)


def verify(model: nn.Module, told: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where a leaf of `model` holds other tensors than were described."""
    for path, leaf in told.items():
        if "same_as" in leaf:
            continue
        module = model.get_submodule(path)
        assert isinstance(module, Compressed | ReadsBack)
        if any(tensor.is_meta for tensor in module.tensors.values()):
            continue  # offloaded
        if isinstance(module, ReadsBack):
            same = describe(module)[""]["read_back"] == leaf["read_back"]
        else:
            same = digest(module) == leaf["sha256"]
        if not same:
            raise CheckpointError(
                f"the tensors of {path} are not those that were saved (SHA-256 differs): a file of the folder is "
                "damaged, incomplete or of another model; restore it."
            )


def digest(leaf: Compressed) -> str:
    """SHA-256 of its tensors, wherever they are; the bias is not one of them."""
    return _hash(leaf.tensors)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {_type_of(tensor)}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or native_of(type(module)) is None or not (isinstance(module, Compressed) or _shape(module)):
        has = "no such module" if module is None else f"a {type(module).__name__} there"
        raise CheckpointError(
            f"the folder has a compressed weight at {path}, and {type(model).__name__} has {has}: config.json is "
            "damaged, or of another model."
        )
    return module


def _shape(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    return "" if weight is None else " x ".join(map(str, weight.shape))


def _type_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}".strip()


def _empty(text: str) -> Tensor:
    """Raises `ValueError` for what `_type_of` does not write."""
    found = re.fullmatch(r"(\w+)(?: (\d+(?:x\d+)*))?", text)
    if found is None or found[1] not in DTYPES:
        raise ValueError(f"{text!r} is no dtype and shape, such as 'uint8 384x192'")
    shape = [int(size) for size in found[2].split("x")] if found[2] else []
    return torch.empty(shape, dtype=DTYPES[found[1]], device="meta")

