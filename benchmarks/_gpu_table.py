"""What the measured rows of `benchmarks/gpu.py` say: shares of the roofline, ratios, bars, as text.

    roofline = max(bytes / copy bandwidth, operations / rate of the library's product of the same numbers)

Bytes are the stored ones, each read once, with x and y; operations are those of the method. Both rates were measured on
the same card in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks._gpu_families import AUTOTUNED, DENSE, FAMILIES, ROOF, Bar

Row = Mapping[str, Any]


def roofline(row: Row, told: Mapping[str, Any]) -> tuple[float, str]:
    """-> (seconds, what bounds them)."""
    memory = row["bytes"] / told["copy_bandwidth"]
    compute = row["flops"] / told["matmul_rates"][row["rate"]]
    return (memory, "memory") if memory >= compute else (compute, "compute")


def ratio(row: Row, rival: str, told: Mapping[str, Any]) -> float | None:
    """How often the rival's seconds, or the share of the roofline; None where it was not measured."""
    if rival == ROOF:
        return float(roofline(row, told)[0] / row["seconds"])
    found = row["rivals"].get(rival)
    return None if found is None else float(found["seconds"] / row["seconds"])


def met(row: Row, bar: Bar, told: Mapping[str, Any]) -> bool | None:
    """None: not measured. As fast as dense is met within the spread of the two."""
    found = ratio(row, bar.rival, told)
    if found is None:
        return None
    noise = row["spread"] + row["rivals"].get(bar.rival, {}).get("spread", 0.0)
    return found >= (bar.times - noise if bar.times == 1 else bar.times)


def report(told: Mapping[str, Any]) -> str:
    """All of it."""
    head = (
        f"{told['device']}, driver {told['driver']}, torch {told['torch']}, triton {told['triton']}, "
        f"{told['date'][:10]}, commit {told['commit']}: copies at {told['copy_bandwidth'] / 1e12:.2f} TB/s, "
        + ", ".join(f"{name} products at {rate / 1e12:.0f} T/s" for name, rate in told["matmul_rates"].items())
    )
    parts = [head, _against(told, DENSE, True)]
    rivals = dict.fromkeys(name for row in told["rows"] for name in row.get("rivals", {}))
    parts += [_against(told, name, False) for name in (AUTOTUNED, *rivals) if name in rivals and name != DENSE]
    parts.append(_bars(told))
    if left := told["left_out"]:
        parts.append(f"left out, for time: {', '.join(left)}")
    if failed := [f"{_name(row)}: {row['error']}" for row in told["rows"] if "error" in row]:
        parts.append("failed:\n" + "\n".join(failed))
    return "\n\n".join(dict.fromkeys(parts))


def _against(told: Mapping[str, Any], rival: str, shares: bool) -> str:
    """Families and sizes down, tokens across."""
    rows = [row for row in told["rows"] if "error" not in row and ratio(row, rival, told) is not None]
    tokens = sorted({row["tokens"] for row in rows})
    cells = {(row["family"], row["rows"], row["columns"], row["tokens"]): row for row in rows}
    lines = [[f"times {rival}" + (f", share {ROOF}" if shares else ""), "N x K", *(f"M = {m}" for m in tokens)]]
    for family, n, k in dict.fromkeys(key[:3] for key in cells):
        line = [family, f"{n} x {k}"]
        for m in tokens:
            row = cells.get((family, n, k, m))
            line.append("-" if row is None else _cell(row, rival, told, shares))
        lines.append(line)
    return columns(lines)


def _cell(row: Row, rival: str, told: Mapping[str, Any], shares: bool) -> str:
    star = "" if row["captured"] else "*"
    share = f" {roofline(row, told)[0] / row['seconds']:.0%}" if shares else ""
    return f"{ratio(row, rival, told):.2f}x{share}{star}"


def _bars(told: Mapping[str, Any]) -> str:
    lines = [["bar", "worst", "at", "of how many", ""]]
    for family in FAMILIES:
        for bar in family.all_bars:
            rows = [
                row for row in told["rows"]
                if row["family"] == family.name and "error" not in row
                and bar.applies((row["rows"], row["columns"]), row["tokens"]) and met(row, bar, told) is not None
            ]  # fmt: skip
            if not rows:
                lines.append([f"{family.name}: {words(bar)}", "-", "-", "0", "not measured"])
                continue
            worst = min(rows, key=lambda row: ratio(row, bar.rival, told) or 0.0)
            missed = sum(not met(row, bar, told) for row in rows)
            found = ratio(worst, bar.rival, told) or 0.0
            number = f"{found:.0%}" if bar.rival == ROOF else f"{found:.2f}x"
            verdict = f"missed at {missed}" if missed else "met"
            where = f"{worst['rows']} x {worst['columns']}, M = {worst['tokens']}"
            lines.append([f"{family.name}: {words(bar)}", number, where, str(len(rows)), verdict])
    return columns(lines)


def words(bar: Bar) -> str:
    """For people."""
    wanted = f"{bar.times:.0%} {ROOF}" if bar.rival == ROOF else f"{bar.times:g}x {bar.rival}"
    if bar.shape:
        wanted += f", {bar.shape[0]} x {bar.shape[1]}"
    if bar.most < 1 << 30:
        wanted += f", M <= {bar.most}"
    return wanted + (f", M >= {bar.fewest}" if bar.fewest > 1 else "")


def _name(row: Row) -> str:
    return f"{row['family']}, {row['rows']} x {row['columns']}, M = {row['tokens']}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Aligned, a rule under the first line. (tabulate is not on a machine that has torch and triton alone.)"""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def joined(cells: Iterable[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()

    return "\n".join([joined(lines[0]), joined("-" * width for width in widths), *map(joined, lines[1:])])
