"""Hugging Face folders: the model its config names, and texts turned into calibration batches. Needs the extra
`fxcompress[hf]`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.core.errors import CalibrationError, CaptureError
from fxcompress.core.new_folder import new_folder

KEPT = frozenset({".json", ".txt", ".model", ".jinja", ".md"})  # tokenizers, templates, model cards; no code


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The model in eval mode, from local files only. Raises `CaptureError` where there is none."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CaptureError(f"{path} holds no config.json: give a folder written by transformers' save_pretrained.")
    transformers = _transformers()
    try:
        names = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        kind = getattr(transformers, names[0], None) if names else None
        model = (kind or transformers.AutoModel).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CaptureError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from error
    assert isinstance(model, nn.Module)
    return model.eval()


def save_model(model: Any, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """A folder with `model` (what `fxcompress.apply` returned) by save_pretrained, and with what else `source` holds:
    tokenizer, and for sentence-transformers its pooling and other modules. No weights of the original are copied.

    Nothing is overwritten. Raises `CheckpointError`.
    """
    with new_folder(Path(target)) as partial:
        model.save_pretrained(partial)
        for path in Path(source).iterdir():
            if path.is_file() and _goes_along(path.name) and not (partial / path.name).exists():
                shutil.copyfile(path, partial / path.name)
        for name in _modules_of(Path(source)):
            shutil.copytree(Path(source) / name, partial / name)


def _goes_along(name: str) -> bool:
    return (Path(name).suffix in KEPT and not name.endswith(".index.json")) or name.startswith(("LICENSE", "NOTICE"))


def _modules_of(folder: Path) -> list[str]:
    """Folders of a sentence-transformers model's further modules, such as 1_Pooling."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    paths = [str(module.get("path", "")) for module in modules]
    return [name for name in paths if name and name == Path(name).name and (folder / name).is_dir()]


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder, from local files only. Raises `CaptureError` where there is none."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(Path(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CaptureError(f"transformers finds no tokenizer in {folder}: {str(error).splitlines()[0]}") from error
    # NOTE: for a folder with a config.json and no tokenizer transformers makes one that knows special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise CaptureError(f"{folder} holds no tokenizer: no vocabulary was found. Save one with save_pretrained.")
    return tokenizer


def batches_of(
    folder: str | os.PathLike[str], model: nn.Module, texts: Path, limit: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """The first `limit` lines of `texts` through the folder's tokenizer, padded within a batch, cut at 128 tokens."""
    if not texts.is_file():
        raise CalibrationError(f"calibration file {texts} does not exist; give a text file with one example a line.")
    lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    if not lines:
        raise CalibrationError(f"calibration file {texts} holds no text; give one example a line.")
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    takes = inputs_of(model)
    return [
        {
            k: v
            for k, v in tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt").items()
            if k in takes
        }
        for chunk in _chunks(lines, batch_size)
    ]


def inputs_of(model: nn.Module) -> set[str]:
    """What captured graphs of this model take; token_type_ids only where the config has segments."""
    config: Any = model.config
    return {"input_ids", "attention_mask"} | ({"token_type_ids"} if getattr(config, "type_vocab_size", 0) else set())


def _chunks(lines: Sequence[str], size: int) -> list[list[str]]:
    return [list(lines[i : i + size]) for i in range(0, len(lines), size)]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CaptureError("reading model folders needs transformers: pip install 'fxcompress[hf]'.") from error
    return transformers
