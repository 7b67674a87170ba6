"""stories260K: a Llama-style decoder of 260 K parameters, its 512-token vocabulary, its loss and text.

Weights, `stories260K.bin` (llama2.c): int32 dim, hidden, layers, heads, kv_heads, vocab, seq, then float32

    emb (V, d)   rms1 (L, d)   wq (L, d, d)   wk, wv (L, kv, d)   wo (L, d, d)
    rms2 (L, d)   w1 (L, h, d)   w2 (L, d, h)   w3 (L, h, d)   rms_final (d)    and two unused tables

The file rotates the pairs (2i, 2i + 1) of each head, transformers the pairs (i, i + head/2). Scores q . k
do not change when q and k permute together, so the rows of wq and wk are reordered, evens before odds.

Vocabulary, `tok512.bin`: int32 max_len, then float32 score, int32 n, n bytes for each token. Encoding
splits " " + text into characters and merges the neighbours of highest score until no pair is a token.

Loss: mean of -log p over all tokens that follow a BOS, in nats; each paragraph is a row of its own, after
BOS, without EOS, cut at 512. On `data.tinystories()` the uncompressed model has 1.4375.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.models import data

BOS = 1
BYTES = 3  # tokens 3 to 258 are single bytes, printed <0x00> to <0xFF>
SEQ = 512
PADDING = -100

Run = Callable[[Tensor], Any]  # input_ids (batch, seq) -> logits (batch, seq, 512), or an object with .logits

DYNAMIC = {"input_ids": {0: Dim("batch"), 1: Dim("seq", max=SEQ)}}


def model() -> LlamaForCausalLM:
    """The decoder in float32, without a cache: `model()(input_ids).logits`."""
    raw = data.find("models/stories260K/stories260K.bin").read_bytes()
    d, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack_from("7i", raw)
    kv = d // heads * kv_heads
    values = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return values[at - size : at].reshape(shape)

    emb = take(vocab, d)
    stacks = {  # in the order of the file, each (layers, ...)
        "input_layernorm": take(layers, d),
        "self_attn.q_proj": _evens_first(take(layers, d, d), heads),
        "self_attn.k_proj": _evens_first(take(layers, kv, d), kv_heads),
        "self_attn.v_proj": take(layers, kv, d),
        "self_attn.o_proj": take(layers, d, d),
        "post_attention_layernorm": take(layers, d),
        "mlp.gate_proj": take(layers, hidden, d),
        "mlp.down_proj": take(layers, d, hidden),
        "mlp.up_proj": take(layers, hidden, d),
    }
    state = {"model.embed_tokens.weight": emb, "lm_head.weight": emb, "model.norm.weight": take(d)}
    for name, stack in stacks.items():
        state |= {f"model.layers.{i}.{name}.weight": w for i, w in enumerate(stack)}

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=seq,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    net = LlamaForCausalLM(config)
    net.load_state_dict(state, strict=True)
    return net.eval()


def _evens_first(w: Tensor, heads: int) -> Tensor:
    """Rows 0 1 2 3 ... of each head -> 0 2 ... 1 3 ...; w is (layers, heads * head_dim, dim)."""
    layers, rows, d = w.shape
    return w.reshape(layers, heads, rows // heads // 2, 2, d).transpose(2, 3).reshape(layers, rows, d)


class Tokenizer:
    """Text <-> tokens of tok512.bin."""

    def __init__(self) -> None:
        raw = data.find("models/stories260K/tok512.bin").read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        at = 4  # past max_len
        while at < len(raw):
            score, n = struct.unpack_from("fi", raw, at)
            self.scores.append(score)
            self.pieces.append(raw[at + 8 : at + 8 + n])
            at += 8 + n
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Tokens with BOS in front."""
        ids: list[int] = []
        for char in " " + text:
            raw = char.encode()
            ids += [self.ids[raw]] if raw in self.ids else [byte + BYTES for byte in raw]
        while True:
            pairs = [self.ids.get(self.pieces[a] + self.pieces[b], -1) for a, b in pairwise(ids)]
            best = max(range(len(pairs)), key=lambda i: self._score(pairs[i]), default=-1)
            if best < 0 or pairs[best] < 0:
                return [BOS, *ids]
            ids[best : best + 2] = [pairs[best]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens with BOS in front; the space that encode adds is removed."""
        parts = [bytes([i - BYTES]) if BYTES <= i < BYTES + 256 else self.pieces[i] for i in ids if i != BOS]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")

    def _score(self, token: int) -> float:
        return self.scores[token] if token >= 0 else -float("inf")


def batches(paragraphs: Sequence[str], batch_size: int = 16, length: int = 64) -> list[Tensor]:
    """Calibration input_ids (batch_size, length): the paragraphs of at least `length` tokens, cut there."""
    tokenizer = Tokenizer()
    rows = [ids[:length] for ids in map(tokenizer.encode, paragraphs) if len(ids) >= length]
    return list(torch.split(torch.tensor(rows), batch_size))


@torch.no_grad()
def loss(run: Run, paragraphs: Sequence[str] | None = None, batch_size: int = 32) -> float:
    """Nats per token over `paragraphs`, by default the 281 of `data.tinystories()`."""
    tokenizer = Tokenizer()
    paragraphs = data.tinystories() if paragraphs is None else paragraphs
    rows = sorted((torch.tensor(tokenizer.encode(p)[:SEQ]) for p in paragraphs), key=len)
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        # Attention is causal: padding on the right changes no token before it, and is not scored.
        ids = pad_sequence(rows[i : i + batch_size], batch_first=True, padding_value=PADDING)
        targets = ids[:, 1:].flatten()
        logits = _logits(run(ids.clamp(min=0)))[:, :-1].flatten(0, 1).float()  # (batch * (seq - 1), 512)
        total += float(F.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum"))
        count += int((targets != PADDING).sum())
    return total / count


@torch.no_grad()
def greedy(run: Run, n: int = 60) -> str:
    """Text of the n most probable next tokens, one after the other, starting from BOS."""
    ids = [BOS]
    for _ in range(n):
        ids.append(int(_logits(run(torch.tensor([ids])))[0, -1].argmax()))
    return Tokenizer().decode(ids)


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits
