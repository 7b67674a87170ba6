"""Every kind of kernel the generator emits, at one size, with the configs it is launched with.

    python -m fxcompress.cli kernels --arch 90

One row a launch and config, compiled ahead of time for a card that need not be there: registers, spills, shared memory,
blocks a multiprocessor, the tensor-core instructions found, integer instructions a weight, and the bound that these put
on its share of the memory's bandwidth (fxcompress.codegen.triton.issue).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxcompress.codegen.packing import packed_bytes
from fxcompress.codegen.spec import parse
from fxcompress.codegen.triton.ahead import KernelReport, compile_ahead
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.generate import generate
from fxcompress.codegen.triton.issue import Mix, mix
from fxcompress.codegen.triton.kernel import Config, Kernel, Launch

SIZE, RANK = 4096, 128
DECODE, SPLIT, PREFILL = Config(16, 128, 1, 4, 4), Config(16, 128, 4, 4, 4), Config(64, 128, 1, 8, 3)
NARROW = Config(16, 64, 1, 4, 3)  # where a program holds several accumulators, or two copies of a tile
TILES = Config(16, 16, 8, 1, 4)
TENSOR_CORES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


@dataclass(frozen=True)
class Entry:
    """A kernel to compile: spec without its epilogue, stored bits a weight, columns a step of its loop."""

    name: str
    product: str
    bits: float
    step: int
    configs: tuple[Config, ...]


def dequantize(bits: int, group: int, rows: int = SIZE, columns: int = SIZE) -> str:
    """A quantized weight as specs write it."""
    groups = columns // group if group else 1
    types = f"uint8[{rows}, {packed_bytes(columns, bits)}], uint8[{rows}, {groups}], uint8[{rows}, {-(-groups // 2)}]"
    return f"dequantize({types}, float32[2], bits={bits}, group_size={group}, columns={columns}, dtype=bfloat16)"


def _linear(weight: str) -> str:
    return f"linear(x, {weight}, bfloat16[{SIZE}])"


_FLOAT8 = f"dequantize_float8(uint8[{SIZE}, {SIZE}], float32[{SIZE}, 1], dtype=bfloat16)"
_TWO_OF_FOUR = f"unmask_2_4(uint8[{SIZE}, {packed_bytes(SIZE // 4, 3)}], bfloat16[{SIZE}, {SIZE // 2}])"
_CORES = ", ".join(["bfloat16[4, 64]", *["bfloat16[64, 64]"] * 4, "bfloat16[64, 4]"])  # rank 16
_DIGITS = [4] * 6
_RMS = f"rms_norm(x, normalized_shape=[{SIZE}], weight=bfloat16[{SIZE}], eps=1e-06)"
_LAYER = f"layer_norm(x, normalized_shape=[{SIZE}], weight=bfloat16[{SIZE}], bias=bfloat16[{SIZE}])"
_MASK = f"uint8[{SIZE}, {SIZE // 8}], bfloat16[{SIZE}, {SIZE // 2}]"


def _tiles(values: str) -> str:
    mask = f"repeat_interleave(uint8[{SIZE // 16}, {SIZE // 128}], repeats=16, dim=0)"
    return _linear(f"unmask({mask}, {values}, columns={SIZE}, tile=16)")


_U = f"bfloat16[{SIZE}, {RANK}]"
ENTRIES = (
    Entry("dense", _linear(f"bfloat16[{SIZE}, {SIZE}]"), 16, 64, (DECODE, SPLIT, PREFILL)),
    Entry("int8", _linear(dequantize(8, 0)), 8, 64, (DECODE, SPLIT, PREFILL)),
    Entry("int4 g64", _linear(dequantize(4, 64)), 4.25, 128, (DECODE, SPLIT, PREFILL)),
    Entry("int4 g128", _linear(dequantize(4, 128)), 4.125, 128, (DECODE, SPLIT, PREFILL)),
    Entry("int3 g64", _linear(dequantize(3, 64)), 3.45, 160, (DECODE, SPLIT, PREFILL)),
    Entry("int2 g64", _linear(dequantize(2, 64)), 2.25, 128, (DECODE, SPLIT, Config(32, 128, 1, 8, 3))),
    Entry("rms norm, int4 g64", f"{_RMS} | linear(_, {dequantize(4, 64)})", 4.25, 128, (DECODE, SPLIT)),
    Entry("layer norm, int4 g64", f"{_LAYER} | linear(_, {dequantize(4, 64)})", 4.25, 128, (DECODE, SPLIT)),
    Entry("layer norm", _LAYER, 16, 64, (Config(1, SIZE, 1, 4, 1),)),
    Entry("float8", _linear(_FLOAT8), 8, 64, (DECODE, SPLIT, PREFILL)),
    Entry("2:4", _linear(_TWO_OF_FOUR), 10, 128, (NARROW,)),
    Entry("mask", _linear(f"unmask({_MASK}, columns={SIZE}, tile=1)"), 9.125, 128, (DECODE,)),
    # Of the kept weights: a tile's place is 32 bits for 256 of them.
    Entry("tiles of 16", _tiles(f"bfloat16[{SIZE}, {SIZE // 2}]"), 16.125, 64, (TILES, Config(64, 16, 4, 4, 4))),
    Entry("tiles of 16, int4", _tiles(dequantize(4, 64, SIZE, SIZE // 2)), 4.375, 128, (TILES,)),
    Entry("low rank", f"low_rank_linear(x, bfloat16[{RANK}, {SIZE}], {_U})", 16, 64, (Config(64, 128, 1, 8, 2),)),
    Entry("low rank, V int4", f"low_rank_linear(x, {dequantize(4, 64, RANK)}, {_U})", 4.25, 128,
          (Config(16, 128, 4, 4, 3), Config(64, 128, 1, 8, 2))),
    Entry("quaternion", f"quaternion_linear(x, bfloat16[{SIZE // 4}, {SIZE}])", 16, 64, (NARROW,)),
    Entry("quaternion int4", f"quaternion_linear(x, {dequantize(4, 64, SIZE // 4)})", 4.25, 128, (NARROW,)),
    Entry("int8 x int8", f"int8_dynamic_linear(x, int8[{SIZE}, {SIZE}], float32[{SIZE}], float32[{SIZE}])", 8, 64,
          (DECODE, Config(128, 128, 1, 8, 3))),
    Entry("blocks", f"block_low_rank_linear(x, bfloat16[1024, {SIZE}], bfloat16[{SIZE}, 1024], blocks=4)", 16, 64,
          (NARROW, PREFILL)),
    Entry("Monarch int4", f"monarch_linear(x, {dequantize(4, 64, 1024)}, {dequantize(4, 64, SIZE, 1024)}, blocks=4)",
          4.25, 128, (NARROW, PREFILL)),
    Entry("tensor train", f"tensor_train_linear(x, [{_CORES}], n={_DIGITS}, m={_DIGITS}, rows={SIZE}, bias=None)",
          16, 64, (NARROW, Config(64, 64, 1, 4, 3))),
    Entry("float8 x float8", f"float8_dynamic_linear(x, uint8[{SIZE}, {SIZE}], float32[{SIZE}], float32[{SIZE}])", 8,
          128, (DECODE, Config(128, 128, 1, 8, 3))),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One launch of a kernel, compiled."""

    entry: Entry
    config: Config
    launch: Launch
    report: KernelReport

    @property
    def faults(self) -> list[str]:
        """Clauses; none is what should be."""
        cores = TENSOR_CORES[self.report.arch]
        found = self.report.faults()
        # Small tiles fall back to the older instruction on sm_100.
        multiplies = self.report.instructions[cores] or self.report.instructions["mma"]
        return found if multiplies or not self.launch.multiplies else [*found, f"has no {cores}"]

    @property
    def mix(self) -> Mix:
        """Of the main loop."""
        threads = 32 * self.config.warps
        return mix(self.report.sass, self.launch.constants["BLOCK_N"] * self.entry.step / threads)


    @property
    def bound(self) -> float | None:
        """Of the bandwidth; None where nothing is multiplied."""
        return self.mix.bound(self.entry.bits) if self.launch.multiplies else None


def kernel_of(entry: Entry) -> Kernel:
    """With a GELU and a residual behind it."""
    return generate(parse(f"{entry.product} | gelu(_) | add(_, extra[0])"), torch.bfloat16, ("full",))


def left_out(arch: int) -> list[str]:
    """What that card cannot run, clauses."""
    least = {entry.name: kernel_of(entry).least_arch for entry in ENTRIES}
    return [f"{name} needs sm_{needed}" for name, needed in least.items() if needed > arch]


def compile_all(arch: int) -> Iterator[Row]:
    """Every entry that the card can run, with every config."""
    for entry in ENTRIES:
        kernel = kernel_of(entry)
        for number, config in enumerate(entry.configs if kernel.least_arch <= arch else ()):
            for launch in [*kernel.launches(config), *(kernel.aside if number == 0 else ())]:
                function = getattr(load_source(kernel.source), launch.form)
                report = compile_ahead(
                    function, launch.signature, launch.constants, arch, config.warps, config.stages, unaligned=("M",)
                )
                yield Row(entry, config, launch, report)


def table(rows: list[Row]) -> str:
    """For people."""
    from tabulate import tabulate  # here: ENTRIES are read where only torch and triton are

    lines = []
    for row in rows:
        r, c = row.report, row.config
        counts = {name: r.instructions[name] for name in ("wgmma", "mma", "tcgen05")}
        cores = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        split = f" / {c.split}" if c.split > 1 else ""
        sizes = row.launch.constants
        tile = " x ".join(str(sizes[name]) for name in ("BLOCK_M", "BLOCK_N") if name in sizes)
        told = ("", "")
        if row.bound is not None:
            told, tile = (f"{row.mix.integer:.2f}", f"{row.bound:.0%}"), tile + split
        lines.append((
            row.entry.name, r.name.removeprefix("fused_"), tile, f"{c.warps}", r.registers, r.spill_bytes,
            f"{r.shared_bytes / 1024:.0f}", r.blocks_per_multiprocessor, cores, *told, "; ".join(row.faults) or "none",
        ))  # fmt: skip
    heads = ["kernel", "function", "tile", "warps", "registers", "spills", "shared KiB", "blocks", "tensor cores"]
    heads += ["integer / weight", "bound", "faults"]
    return tabulate(lines, headers=heads, disable_numparse=True)
