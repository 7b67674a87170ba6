"""Compile a @triton.jit kernel for a GPU that is not here, and read what became of it.

    report = compile_ahead(kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 64}, arch=90)
    report.faults(("wgmma",))        []  or  ["spills 16 bytes", "no wgmma"]

The wheel of Triton brings its own assembler and disassembler: no CUDA toolkit is needed. Registers and spills are what
ptxas says of that very compile; instructions are counted in the disassembled machine code.

Pointers and sizes are compiled as multiples of 16, which is what the launcher sees to and what Triton specialises on by
itself at run time. Without it the same product has scalar loads and no asynchronous copy at all.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Bytes that one block can get.
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_MEMORY_COLUMNS = 512  # of sm_100; more compiles to a bare `trap`
INSTRUCTIONS = {
    "wgmma": r"\b[HQI]GMMA\.", "mma": r"(?<![.\w])[HIQD]MMA\.",  # not HFMA2.MMA
    "tcgen05": r"\bUTC[HQI]?MMA", "cp.async": r"\bLDGSTS",
    "tma": r"\bUTMALDG|UBLKCP", "ldg128": r"\bLDG\.\S*128", "ldsm": r"\bLDSM", "atomic": r"\bREDG?\.|\bATOMG",
    "i2f": r"\bI2F", "prmt": r"\bPRMT", "lop3": r"\bLOP3",
}  # fmt: skip


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled for one architecture."""

    name: str
    arch: int  # 90 is sm_90
    registers: int  # a thread
    spill_bytes: int  # stored and loaded, a thread
    shared_bytes: int  # a block
    tensor_columns: int  # of tensor memory, sm_100
    warps: int  # a block
    seconds: float  # to compile
    instructions: Mapping[str, int]  # by INSTRUCTIONS
    ptx: str
    sass: str

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many fit by registers (allotted in eights), shared memory and warps."""
        by_registers = 65_536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = SHARED_LIMITS[self.arch] // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 64 // self.warps, 32)

    def faults(self, wanted: Iterable[str] = ()) -> list[str]:
        """What must not be, clauses; `wanted` names instructions that must be there."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMITS[self.arch]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory, of {SHARED_LIMITS[self.arch]}")
        if self.tensor_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"takes {self.tensor_columns} columns of tensor memory, of {TENSOR_MEMORY_COLUMNS}")
        if "trap;" in self.ptx:
            found.append("traps")
        return found + [f"has no {name}" for name in wanted if not self.instructions[name]]


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    warps: int = 4,
    stages: int = 3,
    unaligned: Iterable[str] = (),
) -> KernelReport:
    """signature: Triton's type of every argument that is no constexpr ("*bf16", "i32"); unaligned: those of them that
    need not be multiples of 16. Takes 0.1 to 1.2 s."""
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = [name for name in signature if name not in set(unaligned)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    # Triton 3.9 warns that fusing multiplication and addition will be off by default: say what is meant.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    knobs, said = triton.knobs, io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        begun = time.perf_counter()
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        seconds = time.perf_counter() - begun
    log, sass = said.getvalue(), disassemble(compiled.asm["cubin"])

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return KernelReport(
        name=kernel.__name__,
        arch=arch,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        warps=warps,
        seconds=seconds,
        instructions={name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()},
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the nvdisasm that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
