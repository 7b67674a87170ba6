"""How a (rows, columns) weight is cut into digits for a tensor train: columns = n_1 ... n_d, rows = m_1 ... m_d.

Both sides are split into ascending primes, the shorter list is filled up with ones, the lists are zipped, and
neighbours are multiplied until n_k m_k >= rank:

    768 = 2^8 3,  3072 = 2^10 3,  rank 32      (2, 2)^8 (3, 2) (1, 2) (1, 3)   ->   (8, 8) (8, 8) (12, 8) (1, 6)

Bond k lies between core k and core k + 1. Its rank is the one asked for, or what the digits to its left can fill. What
lies to its right does not clip it: that is the paper's rule, and its parameter counts need it. A core at the end that
is smaller than the bond before it therefore stores zeros; `trimmed` multiplies it into its neighbour, which loses
nothing.

Rows may be padded with zeros where they would need a digit above `LARGEST_DIGIT` (vocabularies have whatever size:
30522 = 2 3 5087), up to the next 2^a 3^b. Columns never are: every input would have to be copied.

Paper: Chekalina et al., Efficient GPT Model Pre-training using Tensor Train Matrix Representation, PACLIC 2023
(arXiv 2306.02697); it pads both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

Shapes = tuple[tuple[int, int], ...]  # (n_k, m_k): digits of the column and of the row

LARGEST_DIGIT = 64  # a core is as large as its digits: one with a digit of 5087 is most of the weight again


def primes(number: int) -> list[int]:
    """Prime factors, ascending; none of 1."""
    found, p = [], 2
    while p * p <= number:
        while number % p == 0:
            found.append(p)
            number //= p
        p += 1
    return found + [number] * (number > 1)


def padded(rows: int) -> int:
    """The rows a train is made for: `rows`, or the next 2^a 3^b where a prime factor is above `LARGEST_DIGIT`."""
    if max(primes(rows), default=1) <= LARGEST_DIGIT:
        return rows
    found, power = 1 << rows.bit_length(), 1
    while power < 3 * rows:
        found = min(found, power << (-(-rows // power) - 1).bit_length())
        power *= 3
    return found


def factor_shapes(columns: int, rows: int, rank: int) -> Shapes:
    """The paper's digits for a weight (rows, columns), `rows` padded where needed."""
    shapes, n, m = [], 1, 1
    for p, q in zip_longest(primes(columns), primes(padded(rows)), fillvalue=1):
        n, m = n * p, m * q
        if n * m >= rank:
            shapes.append((n, m))
            n, m = 1, 1
    return tuple(shapes) if n * m == 1 else (*shapes, (n, m))


def trimmed(shapes: Shapes, rank: int) -> Shapes:
    """The same digits with a last core smaller than `rank` multiplied into the one before."""
    while len(shapes) > 1 and math.prod(shapes[-1]) < rank:
        (n, m), (last_n, last_m) = shapes[-2:]
        shapes = (*shapes[:-2], (n * last_n, m * last_m))
    return shapes


def bond_ranks(shapes: Sequence[tuple[int, int]], rank: int) -> tuple[int, ...]:
    """(R_0, ..., R_d): 1 at both ends, min(rank, R_{k-1} n_k m_k) between."""
    ranks = [1]
    for n, m in shapes[:-1]:
        ranks.append(min(rank, ranks[-1] * n * m))
    return (*ranks, 1)


def full_rank(shapes: Shapes) -> int:
    """The rank from which on every weight has an exact train of these shapes: the widest bond any needs."""
    sizes = [n * m for n, m in shapes]
    return max((min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))), default=1)


def core_elements(shapes: Shapes, rank: int) -> int:
    """Elements of all cores."""
    ranks = bond_ranks(shapes, rank)
    return sum(left * n * m * right for left, (n, m), right in zip(ranks, shapes, ranks[1:]))
