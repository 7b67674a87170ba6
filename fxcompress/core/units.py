"""Bytes, ratios and percentages as people write them. Decimal units: 1 MB = 10^6 bytes, 1 MiB = 2^20."""

from __future__ import annotations

import re

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_QUANTITY = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z%]*)\s*")


def parse_quantity(text: str) -> tuple[float, str] | None:
    """`"4x"` -> (4.0, "x"), `"25 %"` -> (25.0, "%"), `"12 MB"` -> (12e6, "bytes"); None when it is none of these."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit in ("x", "X", "%"):
        return number, unit.lower()
    if unit.upper() in _BYTES:
        return number * _BYTES[unit.upper()], "bytes"
    return (number, "") if unit == "" else None


def format_bytes(count: float) -> str:
    """Three significant digits or more: 812 B, 22.71 MB, 1.20 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
