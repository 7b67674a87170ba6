"""One-layer transformers which add modulo 113: one that grokked the sum, one that memorised it.

Input is (a, b, =), the "=" being token 113; logits 0 to 112 at the last position answer a + b mod 113.

    x = E[tokens] + P                    (3, 128)
    x = x + W_O Attention(W_Q x, W_K x, W_V x)        4 heads of 32, causal
    x = x + W_out relu(W_in x + b_in) + b_out         no LayerNorm anywhere
    logits = U x                         (3, 114)

Nanda et al., 2023, arXiv 2301.05217. The grokked weights are close to low rank (a few Fourier frequencies),
the memorised ones are not: 99 % of the energy of E, W_in, W_out, U lies in rank 24, 27, 35, 39 against
87, 121, 122, 88. Both get all 113^2 = 12,769 sums right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.models import data

P = 113
TOKENS = P + 1  # the numbers and "="
WIDTH, HEADS, HIDDEN = 128, 4, 512

Run = Callable[[Tensor], Tensor]  # tokens (batch, 3) -> logits (batch, 3, 114)

DYNAMIC = {"tokens": {0: Dim("batch")}}


class Adder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(torch.zeros(3, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_in = nn.Linear(WIDTH, HIDDEN)
        self.mlp_out = nn.Linear(HIDDEN, WIDTH)
        self.unembed = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, 3)
        x = self.embed(tokens) + self.position
        q, k, v = (w(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, 4, 3, 32)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.mlp_out(F.relu(self.mlp_in(x)))
        logits: Tensor = self.unembed(x)
        return logits


def model(kind: Literal["grokked", "memorised"] = "grokked") -> Adder:
    file = load_file(data.find(f"models/grokking/{kind}_mod113_add.safetensors"))
    net = Adder()
    net.load_state_dict(
        {
            "embed.weight": file["embed.W_E"].T,  # stored (128, 114)
            "position": file["pos_embed.W_pos"],
            "q.weight": file["blocks.0.attn.W_Q"].flatten(0, 1),  # stored (head, 32, 128)
            "k.weight": file["blocks.0.attn.W_K"].flatten(0, 1),
            "v.weight": file["blocks.0.attn.W_V"].flatten(0, 1),
            "o.weight": file["blocks.0.attn.W_O"],  # its columns are (head, 32)
            "mlp_in.weight": file["blocks.0.mlp.W_in"],
            "mlp_in.bias": file["blocks.0.mlp.b_in"],
            "mlp_out.weight": file["blocks.0.mlp.W_out"],
            "mlp_out.bias": file["blocks.0.mlp.b_out"],
            "unembed.weight": file["unembed.W_U"].T,  # stored (128, 114)
        },
        strict=True,
    )
    return net.eval()


def all_sums() -> tuple[Tensor, Tensor]:
    """Every input (12769, 3) and its answer (12769,)."""
    numbers = torch.arange(P)
    a, b = torch.cartesian_prod(numbers, numbers).T
    return torch.stack([a, b, torch.full_like(a, P)], dim=1), (a + b) % P


@torch.no_grad()
def correct(run: Run) -> int:
    """How many of the 12,769 sums come out right."""
    tokens, answers = all_sums()
    return int((run(tokens)[:, -1, :P].argmax(1) == answers).sum())
