"""For the tests of tensor trains: digits, random cores, and the dense weight they amount to, by one einsum."""

import math

import numpy as np
import torch

from fxcompress.passes.tt_shapes import bond_ranks

SHAPES = ((4, 2), (3, 4), (2, 3))  # 24 columns, 24 rows
UNEVEN = ((2, 3), (3, 2), (4, 1), (1, 4))  # 24 columns, 24 rows, digits of 1 among them
PAPER = [  # columns, rows, rank -> the digits and the elements of the paper
    (768, 3072, 16, ((4, 4), (4, 4), (4, 4), (4, 4), (3, 12)), 13_120),
    (768, 3072, 32, ((8, 8), (8, 8), (12, 8), (1, 6)), 166_080),
    (768, 3072, 64, ((8, 8), (8, 8), (12, 8), (1, 6)), 659_840),
    (768, 3072, 80, ((16, 16), (16, 16), (3, 12)), 1_661_760),
    (1024, 4096, 72, ((16, 16), (16, 16), (4, 16)), 1_350_144),
]


def train_of(shapes, rank, dtype=torch.float64, seed=0):
    """Random cores of a train -> (cores, n, m, ranks)."""
    generator, ranks = torch.Generator().manual_seed(seed), bond_ranks(shapes, rank)
    cores = [
        torch.randn(ranks[k] * n, m * ranks[k + 1], generator=generator, dtype=torch.float64).to(dtype)
        for k, (n, m) in enumerate(shapes)
    ]
    return cores, [n for n, _ in shapes], [m for _, m in shapes], ranks


def dense_of(cores, shapes, ranks):
    """The formula of the op, one numpy einsum: W[(i..), (j..)] = sum G_1[., j_1, i_1, .] G_2 ..."""
    d, operands = len(shapes), []
    for k, (core, (n, m)) in enumerate(zip(cores, shapes)):
        operands += [core.detach().double().numpy().reshape(ranks[k], n, m, -1), [k, 20 + k, 40 + k, k + 1]]
    made = np.einsum(*operands, [0, *range(40, 40 + d), *range(20, 20 + d), d], optimize=True)
    return torch.from_numpy(made.reshape(math.prod(m for _, m in shapes), -1))
