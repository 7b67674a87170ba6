"""How near the memory's speed a kernel can come at best, told from its machine code.

The main loop is the longest stretch between a backward branch and its target that multiplies or loads. Its instructions
are counted by the pipe that issues them, and divided by the weights a thread takes in one turn:

    cycles a weight = max(all / 128, integer / 64, float / 128)          lanes a cycle of one multiprocessor
    needed          = bandwidth / (bytes a weight) / multiprocessors / clock

The bound is their quotient, at most 1. Stalls, barriers and tails are left out, so it predicts no speed: it ranks
formulations, and catches a refactoring that loses the fast path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INTEGER = re.compile(
    r"LOP3|PRMT|SHF|SHL|SHR|IADD|ISETP|SEL|FSETP|FMNMX|IMNMX|VIADD|LEA|I2F|F2F|F2FP|I2IP|PLOP3|P2R|R2P|BMSK|SGXT|HSET|"
    r"MOV\b|IABS|VIMNMX"
)
FLOAT = re.compile(r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|IMAD|FSWZADD")
_HOT = re.compile(r"GMMA|MMA\.|LDGSTS|LDG|UTMALDG")


@dataclass(frozen=True)
class Machine:
    """What the model knows of a card."""

    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # Hz


H200 = Machine(4.3e12, 132, 1.755e9)  # bandwidth as measured by a copy; the clock is an assumption


@dataclass(frozen=True)
class Mix:
    """Instructions of the main loop, a weight."""

    all: float
    integer: float
    floating: float

    def bound(self, bits: float, machine: Machine = H200) -> float:
        """Of the bandwidth, 0 to 1, at `bits` stored bits a weight."""
        cycles = max(self.all / 128, self.integer / 64, self.floating / 128)
        needed = machine.bandwidth / (bits / 8) / machine.multiprocessors / machine.clock
        return min(1.0, 1 / (cycles * needed))


def mix(sass: str, weights: float) -> Mix:
    """`weights`: how many one thread takes in a turn of the loop."""
    codes = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in _main_loop(sass)]
    # Uniform instructions go to a pipe of their own.
    codes = [code for code in codes if not re.match(r"U[A-Z]", code) or code.startswith("UTMA")]

    def count(pattern: re.Pattern[str]) -> float:
        return sum(bool(pattern.match(code)) for code in codes) / weights

    return Mix(len(codes) / weights, count(INTEGER), count(FLOAT))


def _main_loop(sass: str) -> list[str]:
    loops = _loops(sass)
    hot = [loop for loop in loops if any(_HOT.search(line) for line in loop)]
    return max(hot or loops or [[]], key=lambda loop: (sum("MMA" in line for line in loop), len(loop)))


def _loops(sass: str) -> list[list[str]]:
    """Instructions between every backward branch and its target."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1].strip())
    found_loops = []
    for at, line in enumerate(lines):
        branch = re.search(r"\bBRA\S*\s+(?:U?P?!?\w+,\s*)?`?\(?(\.L_\w+)", line)
        if branch and labels.get(branch[1], at + 1) <= at:
            found_loops.append(lines[labels[branch[1]] : at + 1])
    return found_loops
