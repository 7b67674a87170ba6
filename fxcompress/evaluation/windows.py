"""Nats of every token of a text but the first, in windows that slide.

    tokens   0 1 2 3 4 5 6 7 8 9        window 6, stride 3
             . x x x x x                scored: x
                   . . . x x x          context: .
                     . . . . . x        the last one ends with the text, and is as long

A token is scored once, with at least window - stride tokens before it (fewer in the first window). With the largest
stride, window - 1, one token overlaps: half the calls of stride = window / 2, and more nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation.answers import batches, call, part

PROBE = 8  # tokens; the last half of them is changed to see whether the first half notices


@dataclass(frozen=True)
class Window:
    """ids: context and scored tokens; the last `scored` of them count."""

    document: int
    ids: tuple[int, ...]
    scored: int


def windows(document: int, ids: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Every token but the first is scored in one of them; none for a single token. 1 <= stride < window."""
    done = 1
    end = min(window, len(ids))
    while done < len(ids):
        yield Window(document, tuple(ids[max(0, end - window) : end]), end - done)
        done, end = end, min(end + stride, len(ids))


def nats(model: nn.Module, found: Sequence[Window], batch_size: int, progress: bool) -> Tensor:
    """-log p of the scored tokens of each window, summed: (N,) float64.

    Windows of different lengths are padded on the right, which no token before it sees. Raises `EvaluationError` for a
    model that sees what comes after, or gives NaN.
    """
    check_causal(model, found[0].ids)
    sums = torch.empty(len(found), dtype=torch.float64)
    groups = list(batches([len(w.ids) for w in found], batch_size, may_pad=True))
    for group in tqdm(groups, "evaluate", unit="batch", disable=not progress, leave=False):
        sums[group] = torch.stack([_of_window(log_p, found[i]) for i, log_p in zip(group, log_probabilities(
            model, [found[i].ids for i in group]))])  # fmt: skip
    if not bool(torch.isfinite(sums).all()):
        raise EvaluationError("the model's log probabilities are NaN or infinite.")
    return sums


def log_probabilities(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """For each row of tokens, log p of the next one, (len(row), vocabulary) float32, from one call."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    output = call(model, {"input_ids": ids, "attention_mask": mask})
    scores = part(output, "logits", "perplexity is of", "LlamaForCausalLM")
    if scores.dim() != 3:
        raise EvaluationError(
            f"the model's logits have shape {tuple(scores.shape)}; perplexity takes (batch, tokens, vocabulary)."
        )
    for row, of_row in zip(rows, scores):
        yield of_row[: len(row)].float().log_softmax(-1).cpu()


def check_causal(model: nn.Module, ids: Sequence[int]) -> None:
    """Raises `EvaluationError` where what is said of a token changes with the tokens after it.

    Calls of one shape do the same sums, so a causal model's answers agree to the bit (stories260K in float32 and in
    bfloat16, and compressed). Of BertForMaskedLM models of random weights, which hardly attend, they differ by 1.5e-4.
    """
    kept = min(PROBE, len(ids)) // 2
    begin = list(ids[: 2 * kept])
    changed = [*begin[:kept], *(begin[0] if token != begin[0] else begin[-1] for token in begin[kept:])]
    if kept == 0 or changed == begin:
        return
    (before,), (after,) = log_probabilities(model, [begin]), log_probabilities(model, [changed])
    off = (before[:kept] - after[:kept]).norm() / before[:kept].norm()
    if float(off) > 1e-5:
        raise EvaluationError(
            "the model's logits change with later tokens, so it is no causal language model, and its perplexity would "
            "mean nothing."
        )


def _of_window(log_p: Tensor, window: Window) -> Tensor:
    """log_p (tokens, vocabulary) of the whole window."""
    targets = torch.tensor(window.ids[-window.scored :])
    return F.nll_loss(log_p[-window.scored - 1 : -1].double(), targets, reduction="sum")
