"""A weight W (rows, columns) as a train of d cores, multiplied, rebuilt, looked up and differentiated.

    W[(i_1 .. i_d), (j_1 .. j_d)] = G_1[1, j_1, i_1, :] G_2[:, j_2, i_2, :] ... G_d[:, j_d, i_d, 1]

    G_k  (R_{k-1}, n_k, m_k, R_k), kept as a matrix (R_{k-1} n_k, m_k R_k)      R_0 = R_d = 1
    n    sizes of the digits of a column, columns = n_1 ... n_d, the first the most significant
    m    sizes of the digits of a row, m_1 ... m_d >= rows: rows beyond the true ones are padding nobody reads

y = x W^T can be had in two ways, and which is cheaper depends on the number of tokens alone:

                                                                multiplications
    contract    x through one core after the other              tokens sum_k M_{k-1} R_{k-1} n_k m_k R_k N_k
    rebuild     W once, by the split s that costs least,        left(s) + join(s) + right(s) + tokens rows columns
                then one product

    left(s)     cores 1 .. s from the left      sum_{1<k<=s} P_{k-1} R_{k-1} n_k m_k R_k    M_k = m_1 .. m_k
    right(s)    cores s+1 .. d from the right   sum_{s<k<d} R_{k-1} n_k m_k R_k Q_k         N_k = n_{k+1} .. n_d
    join(s)     the two                         P_s R_s Q_s                P_k = n_1 m_1 .. n_k m_k,  Q_k = P_d / P_k

The gradient of the cores is taken from dW, one full matrix, whatever the number of tokens (the paper's "full matrix"
backward; nothing but x and the cores is kept for it). With A_k = (G_1 .. G_k)^T dW from the left and the products
B_k = G_{k+1} .. G_d from the right, each made from its neighbour,

    dG_k = A_{k-1} B_k^T        A_{k-1} (R_{k-1} n_k m_k, Q_k)    B_k (R_k, Q_k)

Paper: Chekalina et al., Efficient GPT Model Pre-training using Tensor Train Matrix Representation, PACLIC 2023
(arXiv 2306.02697).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Ints = Sequence[int]


def ranks_of(cores: Sequence[Tensor], m: Ints) -> list[int]:
    """(R_0, ..., R_d), read off the cores' widths."""
    return [1, *(core.shape[1] // size for core, size in zip(cores, m))]


def contract(x: Tensor, cores: Sequence[Tensor], n: Ints, m: Ints) -> Tensor:
    """x (tokens, columns) W^T -> (tokens, m_1 ... m_d), core by core; W is never made."""
    ranks, done, left = ranks_of(cores, m), 1, math.prod(n)
    state = x  # (tokens, n_k ... n_d, m_1 ... m_{k-1}, R_{k-1})
    for core, rank, n_k, m_k in zip(cores, ranks, n, m):
        left //= n_k
        split = state.reshape(len(x), n_k, left, done, rank)
        state = split.permute(0, 2, 3, 4, 1).reshape(-1, rank * n_k) @ core
        done *= m_k
    return state.reshape(len(x), done)


def rebuild(cores: Sequence[Tensor], n: Ints, m: Ints) -> Tensor:
    """W (m_1 ... m_d, n_1 ... n_d), in the dtype of the cores; differentiable."""
    ranks = ranks_of(cores, m)
    split = best_split(n, m, ranks)
    left = cores[0].reshape(-1, ranks[1])  # (P_k, R_k)
    for k in range(1, split):
        left = (left @ cores[k].reshape(ranks[k], -1)).reshape(-1, ranks[k + 1])
    if split == len(cores):
        return from_digits(left, n, m)
    right = cores[-1].reshape(ranks[-2], -1)  # (R_k, Q_k)
    for k in range(len(cores) - 2, split - 1, -1):
        right = (cores[k].reshape(-1, ranks[k + 1]) @ right).reshape(ranks[k], -1)
    return from_digits(left @ right, n, m)


def rows_at(ids: Tensor, cores: Sequence[Tensor], n: Ints, m: Ints) -> Tensor:
    """W[ids] (len(ids), columns): a digit of the row picks a slice of its core, and ids that share it share a product.

    An id that occurs twice is worked out once.
    """
    distinct, place = torch.unique(ids.long(), return_inverse=True)
    ranks, stride = ranks_of(cores, m), math.prod(m)
    state = cores[0].new_ones(len(distinct), 1, 1)  # (ids, n_1 ... n_{k-1}, R_{k-1})
    for core, rank, n_k, m_k in zip(cores, ranks, n, m):
        stride //= m_k
        digits = distinct // stride % m_k
        slices = core.reshape(rank, n_k, m_k, -1)
        made = state.new_empty(len(distinct), state.shape[1], n_k * slices.shape[3])
        for digit in digits.unique().tolist():
            mine = digits == digit
            made[mine] = state[mine] @ slices[:, :, digit].reshape(rank, -1)
        state = made.reshape(len(distinct), state.shape[1] * n_k, slices.shape[3])
    return state.squeeze(2)[place]


def core_gradients(dw: Tensor, cores: Sequence[Tensor], n: Ints, m: Ints) -> list[Tensor]:
    """dW (m_1 ... m_d, n_1 ... n_d) -> the gradient of each core, in its shape."""
    ranks = ranks_of(cores, m)
    rights = [dw.new_ones(1, 1)]  # B_d, ..., B_1
    for k in range(len(cores) - 1, 0, -1):
        rights.append((cores[k].reshape(-1, ranks[k + 1]) @ rights[-1]).reshape(ranks[k], -1))
    pulled, gradients = to_digits(dw, n, m), []
    for k, (core, right) in enumerate(zip(cores, reversed(rights))):
        pulled = pulled.reshape(ranks[k] * n[k] * m[k], -1)  # A_{k-1}
        gradients.append((pulled @ right.t()).reshape(core.shape))
        pulled = core.reshape(-1, ranks[k + 1]).t() @ pulled
    return gradients


def turned(cores: Sequence[Tensor], n: Ints, m: Ints) -> list[Tensor]:
    """The cores of W^T: n and m of each swapped."""
    ranks = ranks_of(cores, m)
    split = (core.reshape(r, n_k, m_k, -1) for core, r, n_k, m_k in zip(cores, ranks, n, m))
    return [core.transpose(1, 2).reshape(core.shape[0] * core.shape[2], -1) for core in split]


def to_digits(w: Tensor, n: Ints, m: Ints) -> Tensor:
    """W (m_1 ... m_d, n_1 ... n_d) -> (n_1, m_1, n_2, m_2, ..., n_d, m_d), flat."""
    d = len(n)
    return w.reshape(*m, *n).permute([x for k in range(d) for x in (d + k, k)]).reshape(-1)


def from_digits(flat: Tensor, n: Ints, m: Ints) -> Tensor:
    """The inverse of `to_digits`."""
    d = len(n)
    split = flat.reshape([size for pair in zip(n, m) for size in pair])
    return split.permute([*range(1, 2 * d, 2), *range(0, 2 * d, 2)]).reshape(math.prod(m), math.prod(n))


def contract_flops(n: Ints, m: Ints, ranks: Ints) -> int:
    """Of `contract`, a token."""
    return sum(
        2 * math.prod(m[:k]) * ranks[k] * n[k] * m[k] * ranks[k + 1] * math.prod(n[k + 1 :]) for k in range(len(n))
    )


def rebuild_flops(n: Ints, m: Ints, ranks: Ints) -> int:
    """Of `rebuild`; the product with W that follows is 2 rows columns a token more."""
    return _split_flops(n, m, ranks, best_split(n, m, ranks))


def contracts(tokens: int, n: Ints, m: Ints, ranks: Ints) -> bool:
    """True where contracting takes no more flops than rebuilding."""
    dense = 2 * math.prod(n) * math.prod(m)
    return tokens * (contract_flops(n, m, ranks) - dense) <= rebuild_flops(n, m, ranks)


def best_split(n: Ints, m: Ints, ranks: Ints) -> int:
    """How many cores `rebuild` multiplies from the left before it joins them with the others."""
    return min(range(1, len(n)), key=lambda s: _split_flops(n, m, ranks, s), default=1)


def _split_flops(n: Ints, m: Ints, ranks: Ints, split: int) -> int:
    sizes = [a * b for a, b in zip(n, m)]
    p = [math.prod(sizes[:k]) for k in range(len(sizes) + 1)]
    core = [ranks[k] * sizes[k] * ranks[k + 1] for k in range(len(sizes))]
    left = sum(p[k] * core[k] for k in range(1, split))
    right = sum(core[k] * (p[-1] // p[k + 1]) for k in range(split, len(sizes) - 1))
    join = p[-1] * ranks[split] if split < len(sizes) else 0
    return 2 * (left + right + join)
