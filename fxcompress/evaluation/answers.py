"""What a model answers to texts: an embedding or logits of each, whatever form the model has.

    transformers model, module mode, torch.compile     takes what its forward names
    compressed graph, lowered module                    takes what it was captured with

Texts of like length share a batch, padded to the longest where the model reads an attention_mask, and not padded at all
where it does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fxcompress.core.devices import device_of
from fxcompress.core.errors import EvaluationError
from fxcompress.core.signature import Signature
from fxcompress.hf import inputs_of

Encoded = Mapping[str, Sequence[int]]  # one text, as a tokenizer gives it


def takes(model: nn.Module) -> set[str]:
    """The names of the inputs it reads."""
    signature = getattr(model, "signature", None)
    if isinstance(signature, Signature):
        return {*signature.positional, *signature.keyword}
    named = set(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters)  # torch.compile's own name
    return named & inputs_of(model) if hasattr(model, "config") else named


def room(model: nn.Module) -> int | None:
    """The most tokens a text may have; None where nothing says."""
    signature = getattr(model, "signature", None)
    if isinstance(signature, Signature):
        dims = next((slot.dims for slot in signature.slots if slot.name == "input_ids"), ())
        last = dims[1] if len(dims) == 2 else None
        return last if isinstance(last, int) or last is None else last[2]
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def encode(tokenizer: Any, texts: Sequence[str], seconds: Sequence[str], most: int) -> list[dict[str, list[int]]]:
    """Each text, or pair of texts, cut at `most` tokens."""
    pairs = (list(seconds),) if seconds else ()
    columns = tokenizer(list(texts), *pairs, truncation=True, max_length=most)
    return [{name: list(columns[name][i]) for name in columns} for i in range(len(texts))]


def embeddings(model: nn.Module, encoded: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool) -> Tensor:
    """The mean of the last hidden states over the attention_mask, (N, d) float64."""

    def pooled(output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        hidden = part(output, "last_hidden_state", "an embedding, or --head, is made of", "BertModel").double()
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)  # (batch, seq, 1)
        return (hidden * mask).sum(1) / mask.sum(1)

    return _collected(model, encoded, tokenizer, batch_size, progress, pooled)


def logits(model: nn.Module, encoded: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool) -> Tensor:
    """(N, classes) float64."""

    def told(output: Any, _: Mapping[str, Tensor]) -> Tensor:
        found = part(output, "logits", "a class is told by", "BertForSequenceClassification; or give a head").double()
        if found.dim() != 2 or found.shape[1] < 2:
            raise EvaluationError(
                f"the model's logits have shape {tuple(found.shape)}; a class of each text is told by (batch, classes)."
            )
        return found

    return _collected(model, encoded, tokenizer, batch_size, progress, told)


def part(output: Any, name: str, what: str, such_as: str) -> Tensor:
    """One output by its name. Raises `EvaluationError`."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if isinstance(found, Tensor):
        return found
    keys = list(output.keys()) if hasattr(output, "keys") else []
    has = f"outputs {', '.join(map(str, keys))}" if keys else f"a {type(output).__name__}"
    raise EvaluationError(f"the model gives {has}; {what} {name}, which models such as {such_as} give.")


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The model's outputs for those of `inputs` that it reads, without gradients, where its weights are."""
    names, device = takes(model), device_of(model)
    with torch.no_grad():
        return model(**{name: x.to(device) for name, x in inputs.items() if name in names})


def _collected(
    model: nn.Module, encoded: Sequence[Encoded], tokenizer: Any, batch_size: int, progress: bool,
    read: Callable[[Any, Mapping[str, Tensor]], Tensor],
) -> Tensor:  # fmt: skip
    """`read` of every batch's outputs, in the order of `encoded`."""
    lengths = [len(one["input_ids"]) for one in encoded]
    order, found = [], []
    groups = list(batches(lengths, batch_size, "attention_mask" in takes(model)))
    for group in tqdm(groups, "evaluate", unit="batch", disable=not progress, leave=False):
        inputs = padded([encoded[i] for i in group], tokenizer)
        moved = {name: x.to(device_of(model)) for name, x in inputs.items()}
        found.append(read(call(model, moved), moved).cpu())
        order += group
    answers = torch.cat(found)[torch.tensor(order).argsort()]
    bad = (~torch.isfinite(answers).all(1)).nonzero().flatten().tolist()
    if bad:
        raise EvaluationError(f"the model's answer to text {bad[0] + 1} of {len(answers)} is NaN or infinite.")
    return answers


def batches(lengths: Sequence[int], size: int, may_pad: bool) -> Iterator[list[int]]:
    """Indices, the shortest first, `size` at a time; of one length each where nothing may be padded."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) == size or not (may_pad or lengths[i] == lengths[group[0]])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def padded(rows: Sequence[Encoded], tokenizer: Any) -> dict[str, Tensor]:
    """One batch, (batch, longest) int64 each, padded on the tokenizer's side; the tokenizer is not changed."""
    known = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "unk_token_id")]
    fill = {"input_ids": next((i for i in known if i is not None), 0),
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}  # fmt: skip
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    longest, left = max(len(row["input_ids"]) for row in rows), getattr(tokenizer, "padding_side", "right") == "left"

    def filled(name: str, values: Sequence[int]) -> NDArray[np.int64]:
        missing = longest - len(values)
        sides = (missing, 0) if left else (0, missing)
        return np.pad(np.asarray(values, dtype=np.int64), sides, constant_values=fill.get(name, 0))

    return {name: torch.from_numpy(np.stack([filled(name, row[name]) for row in rows])) for name in rows[0]}
