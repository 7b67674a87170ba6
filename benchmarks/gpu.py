"""Every family of kernels on this GPU, through the op as a model calls it, against dense products.

    python3 benchmarks/gpu.py                      measure; benchmarks/results/gpu_<device>.json, and its tables
    python3 benchmarks/gpu.py --table FILE         the tables of a file

Calls are replayed in CUDA graphs, on as many copies of the weights as drive each other out of the cache
(fxcompress.codegen.triton.timing). Rivals: the library's bf16 product; torch.compile(mode="max-autotune") of the same,
without CUDA graphs of its own; for 4 bits torch's tinygemm; for low rank two products of the library. The last to be
measured is max-autotune, as far as `--seconds` allow: it compiles some dozens of kernels for every point.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _bare

_bare.use()

from benchmarks._constants import constants_of  # noqa: E402
from benchmarks._gpu_families import AUTOTUNED, DENSE, FAMILIES, SHAPES, TOKENS, Family  # noqa: E402
from benchmarks._gpu_table import report  # noqa: E402
from fxcompress.codegen.ops.fused import fused  # noqa: E402
from fxcompress.codegen.spec import Spec, parse  # noqa: E402
from fxcompress.codegen.triton import timing  # noqa: E402
from fxcompress.codegen.triton.card import Card, card_of  # noqa: E402
from fxcompress.codegen.triton.configs import choose  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.core.errors import KernelError  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
BEFORE_AUTOTUNE = 0.65  # of the time at most


@dataclass
class Bench:
    """Where and how to measure. cache: bytes of its L2. seconds: of wall time, in all."""

    device: str
    card: Card
    cache: int
    seconds: float
    timer: timing.Timer = timing.measure
    begun: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)

    def spent(self, share: float) -> bool:
        return time.perf_counter() - self.begun > share * self.seconds

    def time(self, tensors: Sequence[Tensor], call: Callable[[list[Tensor]], object]) -> dict[str, Any]:
        """Of `call` on one of as many copies of `tensors` as are cold."""
        stored = sum(t.numel() * t.element_size() for t in tensors)
        count = timing.copies(stored, self.cache)
        sets = [list(tensors), *([t.clone() for t in tensors] for _ in range(count - 1))]
        return asdict(self.timer([lambda own=own: call(own) for own in sets]))


def measured(bench: Bench, families: Sequence[Family], shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """One row a family, size and number of tokens, with what it is held against."""
    rows: list[dict[str, Any]] = []
    for (n, k), tokens in itertools.product(shapes, TOKENS):
        if bench.spent(BEFORE_AUTOTUNE):
            bench.left_out.append(f"{n} x {k}, M = {tokens}")
            continue
        x = torch.randn(tokens, k, device=bench.device).bfloat16()
        weight = (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
        try:
            dense = bench.time([weight], lambda own, x=x: F.linear(x, own[0]))
        except RuntimeError as error:  # after an illegal access nothing runs any more; what is known is kept
            bench.left_out.append(f"{n} x {k}, M = {tokens} ({_reason(error)})")
            continue
        for family in families:
            row = {"family": family.name, "rows": n, "columns": k, "tokens": tokens, **_row(bench, family, n, k, x)}
            if "error" not in row:
                row["rivals"] = {DENSE: dense, **row["rivals"]}
            rows.append(row)
            print(_progress(row), flush=True)
    _autotune(bench, rows)
    return rows


def _row(bench: Bench, family: Family, n: int, k: int, x: Tensor) -> dict[str, Any]:
    """A kernel that cannot be had is a row with an error, and no end of the benchmark."""
    fallen = _Fallen()
    kernels = logging.getLogger("fxcompress.kernels")
    kernels.addHandler(fallen)
    name = f"{family.name} {n} x {k} M = {len(x)}"
    try:
        text = family.spec(n, k)
        spec = parse(text)
        tensors = constants_of(spec, bench.device)
        found = bench.time(tensors, lambda own: fused(x, own, [], text, name))
        if fallen.said:
            return {"error": fallen.said[0], "rivals": {}}
        rivals = {name: bench.time(*rival(n, k, x, tensors)) for name, rival in family.rivals}
        return {**found, **_counted(spec, x), "by": _by(bench, spec, x), "rate": _name(family.rate), "rivals": rivals}
    except Exception as error:
        return {"error": _reason(error), "rivals": {}}
    finally:
        kernels.removeHandler(fallen)


class _Fallen(logging.Handler):
    """What is said where a node runs as plain PyTorch: not what is to be timed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _counted(spec: Spec, x: Tensor) -> dict[str, int]:
    """Bytes that have to be moved, and operations."""
    kernel = generate(spec, x.dtype)
    stored = sum(torch.Size(c.shape).numel() * c.dtype.itemsize for c in spec.constants)
    activations = len(x) * (kernel.columns + kernel.rows) * x.element_size()
    return {"bytes": stored + activations, "flops": len(x) * kernel.flops}


def _by(bench: Bench, spec: Spec, x: Tensor) -> str:
    """The launch config that dispatch took."""
    config = choose(generate(spec, x.dtype), len(x), bench.card)
    if config is None:
        return "apart"
    return f"{config.block_m} x {config.block_n} / {config.split}, {config.warps} warps, {config.stages} stages"


def _autotune(bench: Bench, rows: Sequence[dict[str, Any]]) -> None:
    """The dense product as torch compiles it, into the rows of its size, while there is time."""
    points = dict.fromkeys((row["rows"], row["columns"], row["tokens"]) for row in rows if "error" not in row)
    for n, k, tokens in points:
        if bench.spent(1.0):
            bench.left_out.append(f"{AUTOTUNED} at {n} x {k}, M = {tokens}")
            continue
        x = torch.randn(tokens, k, device=bench.device).bfloat16()
        weight = (torch.randn(n, k, device=bench.device) / k**0.5).bfloat16()
        torch.compiler.reset()  # every size is compiled by itself
        run = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        try:
            found = bench.time([weight], lambda own, run=run, x=x: run(x, own[0]))
        except Exception as error:
            bench.left_out.append(f"{AUTOTUNED} at {n} x {k}, M = {tokens} ({_reason(error)})")
            continue
        print(f"{AUTOTUNED} {n} x {k} M = {tokens}   {found['seconds'] * 1e6:.1f} us", flush=True)
        for row in rows:
            if (row["rows"], row["columns"], row["tokens"]) == (n, k, tokens) and "error" not in row:
                row["rivals"][AUTOTUNED] = found


def _progress(row: dict[str, Any]) -> str:
    where = f"{row['family']:<14} {row['rows']} x {row['columns']} M = {row['tokens']:<5}"
    if "error" in row:
        return f"{where} failed: {row['error']}"
    times = row["rivals"][DENSE]["seconds"] / row["seconds"]
    return f"{where} {row['seconds'] * 1e6:9.1f} us +-{row['spread']:.0%}   {times:.2f}x dense   {row['by']}"


def run(
    bench: Bench, families: Sequence[Family] = FAMILIES, shapes: Sequence[tuple[int, int]] = SHAPES, large: int = 8192
) -> dict[str, Any]:
    """What is written to the file; large: the side of the products that give the rates."""
    rates = dict.fromkeys(family.rate for family in families)
    told: dict[str, Any] = {
        "device": bench.card.name, **_versions(bench.device),
        "copy_bandwidth": timing.copy_bandwidth(bench.timer, bench.device, large * large * 16),
        "matmul_rates": {
            _name(rate): timing.matmul_rate(rate, bench.timer, bench.device, large) for rate in rates
        },
    }  # fmt: skip
    rows = measured(bench, families, shapes)
    return {**told, "rows": rows, "left_out": bench.left_out, "seconds": time.perf_counter() - bench.begun}


def _versions(device: str) -> dict[str, str]:
    import triton

    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    here = {"torch": torch.__version__, "triton": triton.__version__, "date": date}
    commit = _said("git", "describe", "--always", "--dirty", "--exclude=*")
    driver = "none"
    if device != "cpu":
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {**here, "commit": commit, "driver": driver}


def _said(*command: str) -> str:
    """What a program prints, or that it could not be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent, timeout=20)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(told: dict[str, Any], folder: Path) -> Path:
    """gpu_<device>.json"""
    name = re.sub(r"\W+", "_", told["device"]).strip("_")
    path = folder / f"gpu_{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where nothing could be measured; a bar that is missed is said in the table."""
    parser = argparse.ArgumentParser(description="Measure every family of kernels on this GPU.")
    parser.add_argument("--seconds", type=float, default=360, help="wall time it may take (default 360)")
    parser.add_argument("--table", metavar="FILE", type=Path, help="print the tables of a result, measure nothing")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="where to write (default results)")
    options = parser.parse_args(arguments)
    if options.table:
        print(report(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    try:
        device = timing.need_cuda("measuring kernels")
    except KernelError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    told = run(Bench("cuda", card_of(device), cache, options.seconds))
    path = write(told, options.out)
    print(f"\n{report(told)}\n\nwritten to {path}")
    return 0 if any("error" not in row for row in told["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
