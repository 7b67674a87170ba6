"""A vision transformer for MNIST: 6 layers of width 64 over 16 patches of 7 x 7 pixels and a class token.

    z = [cls; patches W_e^T + b_e] + positions        (17, 64)
    z = z + Attention(LayerNorm(z));  z = z + MLP(LayerNorm(z))        six times, no final norm
    logits = W_2 gelu(W_1 z_cls + b_1) + b_2          (10)

As trained, attention scores are divided by sqrt(64), the width, and not by sqrt(8), that of a head.
Images in [0, 1] go through `normalise` first. .9794 of MNIST's test images come out right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.models import data

WIDTH, DEPTH, HEADS, HIDDEN = 64, 6, 8, 128
PATCH, GRID = 7, 4  # pixels a patch side, patches an image side

Run = Callable[[Tensor], Tensor]  # normalised images (batch, 1, 28, 28) -> logits (batch, 10)

DYNAMIC = {"images": {0: Dim("batch")}}

NAMES = {  # in the file -> here
    "transformer.layers.": "blocks.",
    ".0.fn.norm.": ".norm1.",
    ".0.fn.fn.": ".attention.",
    ".1.fn.norm.": ".norm2.",
    ".1.fn.fn.net.": ".mlp.",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 17, 64)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (batch, 8, 17, 8)
        y = F.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5)
        out: Tensor = self.to_out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_to_embedding = nn.Linear(PATCH * PATCH, WIDTH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.zeros(1, GRID * GRID + 1, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.mlp_head = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 10))

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28)
        rows = images.reshape(-1, GRID, PATCH, GRID, PATCH)  # patch row, pixel row, patch column, ...
        patches = rows.transpose(2, 3).reshape(-1, GRID * GRID, PATCH * PATCH)
        z = self.patch_to_embedding(patches)
        z = torch.cat([self.cls_token.expand(z.shape[0], -1, -1), z], dim=1) + self.pos_embedding
        logits: Tensor = self.mlp_head(self.blocks(z)[:, 0])
        return logits


def model() -> ViT:
    state = load_file(data.find("models/vit_mnist/vit_mnist.safetensors"))
    net = ViT()
    net.load_state_dict({_rename(name): value for name, value in state.items()}, strict=True)
    return net.eval()


def normalise(images: Tensor) -> Tensor:
    return (images - 0.1307) / 0.3081


@torch.no_grad()
def accuracy(run: Run, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of `images`, in [0, 1], given their label."""
    guesses = [run(normalise(batch)).argmax(1) for batch in torch.split(images, batch_size)]
    return float((torch.cat(guesses) == labels).float().mean())


def _rename(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name
