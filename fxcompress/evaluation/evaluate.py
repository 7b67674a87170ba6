"""evaluate: a model on a task, beside the original it was made from, with intervals.

    similarity        Spearman's rank correlation of the scores with the cosine of mean-pooled embeddings
    classification    accuracy of the model's own logits, or of a linear head on its embeddings
    perplexity        nats a token, and e to that, of text in sliding windows

Both models answer the same examples, and the difference has an interval of its own (fxcompress.evaluation.bootstrap).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation import bootstrap
from fxcompress.evaluation.answers import embeddings, encode, logits, room
from fxcompress.evaluation.bootstrap import Estimate, Samples, Statistic
from fxcompress.evaluation.head import Head
from fxcompress.evaluation.tasks import Classification, Kind, Perplexity, Similarity, Task, read_task
from fxcompress.evaluation.windows import Window, nats, windows

MAX_LENGTH, WINDOW = 256, 512
UNBOUNDED = 1 << 62  # tokens; a tokenizer that knows no bound says 10^30


@dataclass(frozen=True)
class Measure:
    """One quantity: of the model, of the original, and original - model over the same examples."""

    name: str
    model: Estimate
    original: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class Evaluation:
    """examples: what was drawn anew for the intervals, and `unit`, what one of them is."""

    kind: Kind
    examples: int
    unit: str  # "pairs", "texts", "windows" or "documents"
    how: str  # a clause
    measures: tuple[Measure, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        beside = self.measures[0].original is not None
        heads = ["", "original", "compressed", "original - compressed"] if beside else ["", "model"]
        rows = [
            [m.name, *([_text(m.original)] if m.original else []), _text(m.model),
             *([_text(m.difference, "+")] if m.difference else [])]
            for m in self.measures
        ]  # fmt: skip
        same = ", the same ones for both" if beside else ""
        return (
            f"{self.kind}: {self.examples:,} {self.unit}; {self.how}\n\n"
            f"{tabulate(rows, headers=heads, disable_numparse=True)}\n\n"
            f"in brackets: 95% intervals over {self.unit} drawn anew{same}"
        )


def evaluate(
    model: nn.Module,
    task: Task | str | os.PathLike[str],
    tokenizer: Any,
    *,
    original: nn.Module | None = None,
    head: Head | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    max_length: int = MAX_LENGTH,
    window: int | None = None,
    stride: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """How well `model` does `task`, beside `original` where one is given, with 95 % intervals.

    model, original: anything that is called like a transformers model: one itself, what `compile`, `load`, `apply` or
        `lower` returned, or torch.compile. In eval mode.
    task: what `read_task` returned, or the file to read.
    tokenizer: a transformers tokenizer.
    head: for classification by an encoder without one of its own: classes of the mean of the last hidden states over
        the attention_mask, not normalised (`load_head`, `fit_head`).
    classes: the labels, in the order of the logits; by default the head's, or those in the config of `original` or
        `model`, or 0, 1, ... . A label that is none of them is taken for a number of a class.
    max_length: tokens of a text in similarity and classification, or fewer where a model takes fewer.
    window, stride: of perplexity, in tokens; by default 512, or what the models take, and half the window.

    Raises `EvaluationError`, and `InputError` where a graph was captured for other inputs.
    """
    task = read_task(task) if isinstance(task, str | os.PathLike) else task
    models = [model] if original is None else [original, model]
    for one in models:
        if one.training:
            raise EvaluationError(f"{type(one).__name__} is in training mode: call eval() on it first.")
    if head is not None and not isinstance(task, Classification):
        raise EvaluationError("a head is for classification, and this task is none.")
    if batch_size < 1 or max_length < 2:
        raise EvaluationError(f"batch_size {batch_size} and max_length {max_length}: 1 and 2 are the least.")
    most = min([n for n in (getattr(tokenizer, "model_max_length", None), *map(room, models)) if n], default=UNBOUNDED)
    run = (tokenizer, batch_size, progress)
    if isinstance(task, Similarity):
        return _similarity(models, task, min(max_length, most), *run)
    if isinstance(task, Perplexity):
        return _perplexity(models, task, most, window, stride, *run)
    named = classes or (head.classes if head else next(filter(None, map(_classes_of, models)), None))
    return _classification(models, task, head, named, min(max_length, most), *run)


def _similarity(
    models: Sequence[nn.Module], task: Similarity, most: int, tokenizer: Any, batch_size: int, progress: bool
) -> Evaluation:
    n = len(task.scores)
    encoded = encode(tokenizer, [*task.first, *task.second], (), most)
    found = [embeddings(model, encoded, tokenizer, batch_size, progress) for model in models]
    cosines = [F.cosine_similarity(e[:n], e[n:]).numpy() for e in found]
    measure = _measured("Spearman", bootstrap.spearman, cosines, np.asarray(task.scores))
    return Evaluation("similarity", n, "pairs", "cosine of mean-pooled last hidden states", (measure,))


def _classification(
    models: Sequence[nn.Module], task: Classification, head: Head | None, classes: Sequence[str] | None, most: int,
    tokenizer: Any, batch_size: int, progress: bool,
) -> Evaluation:  # fmt: skip
    encoded = encode(tokenizer, task.texts, task.seconds, most)
    answer = embeddings if head else logits
    found = [answer(model, encoded, tokenizer, batch_size, progress) for model in models]
    told = [head(e) for e in found] if head else found
    wanted = _indices(task.labels, classes, told[0].shape[1])
    right = [(scores.argmax(1).numpy() == wanted).astype(np.float64) for scores in told]
    measure = _measured("accuracy", bootstrap.ratio, right, np.ones(len(wanted)))
    how = "a linear head on mean-pooled last hidden states" if head else "the largest of the model's logits"
    return Evaluation("classification", len(wanted), "texts", how, (measure,))


def _perplexity(
    models: Sequence[nn.Module], task: Perplexity, most: int, window: int | None, stride: int | None, tokenizer: Any,
    batch_size: int, progress: bool,
) -> Evaluation:  # fmt: skip
    window = min(WINDOW, most) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not (2 <= window <= most and 1 <= stride < window):
        bound = f"2 to {most}" if most < UNBOUNDED else "2 or more"
        raise EvaluationError(f"window {window}, stride {stride}: a window has {bound} tokens, a stride fewer than it.")
    documents = [tokenizer(text, verbose=False)["input_ids"] for text in task.texts]
    found: list[Window] = [w for i, ids in enumerate(documents) for w in windows(i, ids, window, stride)]
    if not found:
        raise EvaluationError("the text has a single token; two or more are wanted.")
    own = np.arange(len(found)) if len(documents) == 1 else np.asarray([w.document for w in found])
    tokens = _sums(own, np.asarray([w.scored for w in found], dtype=np.float64))
    each = [_sums(own, nats(model, found, batch_size, progress).numpy()) for model in models]
    measures = (
        _measured("nats a token", bootstrap.ratio, each, tokens),
        _measured("perplexity", bootstrap.perplexity, each, tokens),
    )
    unit = "windows" if len(documents) == 1 else "documents"
    how = f"{int(tokens.sum()):,} tokens scored, windows of {window}, stride {stride}"
    return Evaluation("perplexity", len(tokens), unit, how, measures)


def _measured(name: str, statistic: Statistic, xs: Sequence[Samples], y: Samples) -> Measure:
    """`xs`: of the original first, where there are two."""
    estimates = [bootstrap.interval(statistic, x, y) for x in xs]
    if len(xs) == 1:
        return Measure(name, estimates[0])
    return Measure(name, estimates[1], estimates[0], bootstrap.interval(bootstrap.difference(statistic), *xs, y))


def _sums(own: Any, values: Samples) -> Samples:
    """Values summed by the number of their owner; owners of none are left out."""
    return np.asarray([values[own == i].sum() for i in np.unique(own)])


def _indices(labels: Sequence[str], classes: Sequence[str] | None, count: int) -> Any:
    if classes is not None and len(classes) != count:
        raise EvaluationError(f"{len(classes)} classes are named, and the logits are of {count}.")
    known = {str(i): i for i in range(count)}
    known |= {name: i for i, name in enumerate(classes or ())}
    for number, label in enumerate(labels, 1):
        if label not in known:
            raise EvaluationError(
                f"example {number} has label {label!r}, which is none of the model's {count} classes: "
                f"{', '.join(classes or known)}. Name them in the order of the logits with classes."
            )
    return np.asarray([known[label] for label in labels])


def _classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """Of a transformers config."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    return tuple(names[i] for i in range(len(names))) if names else None


def _text(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"
