"""Bytes, seconds, ratios and percentages as people write them. Decimal units: 1 MB = 10^6 bytes, 1 MiB = 2^20."""

from __future__ import annotations

import re

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_QUANTITY = re.compile(rf"\s*({_NUMBER})\s*([A-Za-zµ%]*)\s*")


def parse_quantity(text: str) -> tuple[float, str] | None:
    """`"4x"` -> (4.0, "x"), `"25 %"` -> (25.0, "%"), `"12 MB"` -> (12e6, "bytes"), `"12 ms"` -> (0.012, "seconds");
    None when it is none of these."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit in ("x", "X", "%"):
        return number, unit.lower()
    if unit.upper() in _BYTES:
        return number * _BYTES[unit.upper()], "bytes"
    if unit in _SECONDS:
        return number * _SECONDS[unit], "seconds"
    return (number, "") if unit == "" else None


def format_bytes(count: float) -> str:
    """Three significant digits or more: 812 B, 22.71 MB, 1.20 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Three significant digits: 1.20 s, 45.3 ms, 812 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size * 0.9995:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def speedup(before: float, after: float) -> str:
    """4.10 ms -> 2.02 ms (2.03x)"""
    return f"{format_seconds(before)} -> {format_seconds(after)} ({before / after:.2f}x)"


def _three(number: float) -> str:
    size = abs(number)
    return f"{number:.0f}" if size >= 99.95 else f"{number:.1f}" if size >= 9.995 else f"{number:.2f}"
