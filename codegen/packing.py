"""Codes of 2, 3, 4 or 8 bits (masks: of 1) packed without a gap: eight codes fill `bits` bytes, little end first.

    word = sum_i code_i 2^(bits i)  for i = 0..7,   stored as its `bits` low bytes;   8-bit codes are stored as they are

A row is padded with zero codes to a multiple of eight, so every row starts on a byte and can be gathered alone
(embeddings).
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return columns if bits == 8 else -(-columns // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., columns), each below 2**bits -> uint8 (..., packed_bytes)."""
    if bits == 8:
        return codes.contiguous()
    columns = codes.shape[-1]
    padded = torch.unflatten(torch.nn.functional.pad(codes, (0, -columns % 8)), -1, (-1, 8)).long()  # (..., words, 8)
    word = (padded << _shifts(bits, 8, codes.device)).sum(-1, keepdim=True)
    return ((word >> _shifts(8, bits, codes.device)) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 (..., packed_bytes) -> uint8 codes (..., columns)."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):  # a byte holds whole codes
        codes = (packed.unsqueeze(-1) >> _shifts(bits, 8 // bits, packed.device).to(torch.uint8)) & mask
    else:
        parts = torch.unflatten(packed, -1, (-1, bits)).to(torch.int32)  # (..., words, bits)
        word = (parts << _shifts(8, bits, packed.device).int()).sum(-1, dtype=torch.int32)
        codes = ((word.unsqueeze(-1) >> _shifts(bits, 8, packed.device).int()) & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :columns]


def _shifts(step: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(0, step * count, step, device=device)
