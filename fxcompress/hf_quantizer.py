"""transformers' `save_pretrained` and `from_pretrained` for models with compressed leaves.

    small = fxcompress.apply(model, compiled)
    small.save_pretrained("my-bert-4x")                         config.json says what each leaf is
    small = AutoModel.from_pretrained("my-bert-4x")             after `import fxcompress`

Registered with transformers under the method "fxcompress": leaves are swapped on meta before any weight is read, and
transformers loads their tensors as it loads any others (shards, devices, renamed heads). The import of this module is
the registration, as transformers wants it; it needs the extra `fxcompress[hf]`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxcompress.core.errors import CheckpointError
from fxcompress.pretrained import DTYPES, describe, hollowed, share, verify

log = logging.getLogger("fxcompress.hf")

METHOD, FORMAT = "fxcompress", 1


@register_quantization_config(METHOD)
class FxcompressConfig(QuantizationConfigMixin):
    """What config.json says under "quantization_config".

    leaves: what `fxcompress.pretrained.describe` returned. dtype: of the model's answers, such as "float32".
    """

    def __init__(self, leaves: Any = None, dtype: str = "float32", format: int = FORMAT, **unknown: Any) -> None:
        if format != FORMAT:
            raise CheckpointError(
                f"config.json describes compressed weights in format {format!r}; this version of fxcompress reads "
                f"format {FORMAT}."
            )
        if not isinstance(leaves, Mapping) or not all(isinstance(v, Mapping) for v in leaves.values()):
            raise CheckpointError(
                'config.json has no description of compressed weights: quantization_config holds no "leaves".'
            )
        if dtype not in DTYPES:
            raise CheckpointError(f"config.json says that answers are {dtype!r}, which is no dtype: it is damaged.")
        self.quant_method = METHOD
        self.format, self.dtype, self.leaves = format, dtype, dict(leaves)


@register_quantizer(METHOD)
class FxcompressQuantizer(HfQuantizer):
    """Swaps leaves before loading, checks and shares their tensors after it, and describes them when saving."""

    def __init__(self, quantization_config: FxcompressConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise CheckpointError(
                "from_pretrained does not compress: call fxcompress.compile and fxcompress.apply on the loaded model."
            )
        super().__init__(quantization_config, **kwargs)
        self._waiting: dict[str, nn.Parameter] = {}
        self._leaves: dict[str, Any] = {}  # of the model that is being loaded, by its own names

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The one that was saved: compressed tensors do not survive a cast."""
        own = DTYPES[self.quantization_config.dtype]
        if dtype not in (own, torch.get_default_dtype()):
            log.warning("loaded in %s, as it was compressed: %s was asked for, and codes cannot be cast", own, dtype)
        return own

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None: every tensor stays as it was saved."""
        return None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        for file in checkpoint_files or ():
            _check_whole(Path(file))
        self._leaves = _by_own_names(model, self.quantization_config.leaves)
        self._waiting = hollowed(model, self._leaves)
        for path in self._leaves:
            model.get_submodule(path)._is_hf_initialized = True  # or its weight would be drawn at random
        kept = {path: leaf.get("read_back", ["weight"]) for path, leaf in self._leaves.items()}
        weights = {f"{path}.{name}" for path, names in kept.items() for name in names}
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if a not in weights and b not in weights}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        verify(model, self._leaves)
        share(model, self._leaves, self._waiting)
        for path in self._leaves:
            leaf = model.get_submodule(path)
            for tensor in leaf.tensors.values():
                tensor.requires_grad_(False)
        self._waiting = {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called first by save_pretrained: config.json is written next, so what it says is made here."""
        leaves = describe(model)
        dtype = str(model.dtype).removeprefix("torch.")
        model.config.quantization_config = FxcompressConfig(leaves, dtype)
        model._weight_conversions = []  # or tensors are renamed, or split by expert, as dense ones once were
        second = {path for path, leaf in leaves.items() if "same_as" in leaf}
        dropped = {f"{path}.{name}" for path in second for name in model.get_submodule(path).tensors}
        return {name: t for name, t in model.state_dict().items() if name not in dropped}, {}

    def is_serializable(self) -> bool:
        """True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through compressed leaves to adapters, norms and biases."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that Trainer takes a model without adapters: what is not compressed can be trained."""
        return True


def adopt(model: nn.Module) -> None:
    """Let every transformers model within `model` be saved with its compressed leaves."""
    modeling = sys.modules.get("transformers.modeling_utils")  # half a second to import, and without it there is none
    for part in model.modules():
        if modeling is not None and isinstance(part, modeling.PreTrainedModel):
            part.hf_quantizer = FxcompressQuantizer(FxcompressConfig({}))
            part.is_quantized, part.quantization_method = True, METHOD


def _by_own_names(model: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`leaves` by the names of `model`, which may be a head around what was saved, or what was saved without its head.

    What it has no module for is left out, as transformers leaves out tensors. Raises `CheckpointError` where it has
    none for any.
    """
    prefix, has = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules(remove_duplicate=False)}

    def own(path: str) -> str:
        options = (path, path.removeprefix(prefix), prefix + path)
        return next((name for name in options if name in has), path)

    found = {}
    for path, leaf in leaves.items():
        if own(path) in has:
            found[own(path)] = {**leaf, "same_as": own(leaf["same_as"])} if "same_as" in leaf else leaf
    alone = [path for path, leaf in found.items() if "same_as" in leaf and leaf["same_as"] not in found]
    if leaves and (alone or not found):
        path = next(iter(alone or leaves))
        raise CheckpointError(
            f"the folder has a compressed weight at {path}, and {type(model).__name__} has no such module: config.json "
            "is damaged, or of another model."
        )
    return found


def _check_whole(file: Path) -> None:
    """Raises `CheckpointError` where a safetensors file is cut short or none at all."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            opened.keys()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); restore the folder.") from error
