"""Launch configs before anything was measured: the rule's, amended where machine code says that it must be slower.

    in flight = blocks of a multiprocessor (stages - 1) bytes of a stage       asked for, not yet arrived
    needed    = bandwidth latency / multiprocessors                            Little's law
    score     = min(bound, in flight / needed)                                 of the memory's speed, at most 1

`bound` is what the issue of instructions allows (fxcompress.codegen.triton.issue). Every config is compiled ahead of
time for a card that need not be there; one that spills or does not fit is out. Another takes the place of the rule's
only where its score is higher by more than `MARGIN`: this is a model, and `fxcompress tune` on the card overrules it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fxcompress.codegen.spec import parse
from fxcompress.codegen.triton.ahead import compile_ahead
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.catalogue import Entry, Row
from fxcompress.codegen.triton.configs import ANY
from fxcompress.codegen.triton.generate import generate
from fxcompress.codegen.triton.issue import H200, Machine
from fxcompress.codegen.triton.kernel import Config, Kernel

TOKENS = (16, 64)  # buckets: where the memory bounds a kernel, and this model says anything
LATENCY = 1e-6  # s, of memory under load; an assumption
MARGIN = 0.05


@dataclass(frozen=True)
class Seed:
    """What became of one kernel and bucket."""

    label: str
    bucket: int
    rule: Config
    config: Config
    scores: tuple[float, float]  # the rule's, and that of `config`


def seeds(arch: int, entries: Sequence[Entry], machine: Machine = H200) -> Iterator[Seed]:
    """Kernels whose rule has no config at a bucket are left out."""
    for entry in entries:
        kernel = generate(parse(entry.product), torch.bfloat16)
        for bucket in TOKENS if kernel.least_arch <= arch else ():
            rule = kernel.rule(bucket, machine.multiprocessors) if kernel.forms else None
            if rule is None:
                continue
            scores = {config: _score(kernel, entry, config, bucket, arch, machine) for config in _near(rule)}
            best = max(scores, key=lambda config: scores[config])
            if scores[best] <= scores[rule] + MARGIN:
                best = rule
            yield Seed(kernel.label, bucket, rule, best, (scores[rule], scores[best]))


def table(found: Sequence[Seed], arch: int, triton: str) -> dict[str, Any]:
    """As fxcompress.codegen.triton.configs reads it; what is the rule's is left to the rule."""
    configs: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in found:
        if seed.config != seed.rule:
            configs.setdefault(seed.label, {}).setdefault(ANY, {})[str(seed.bucket)] = asdict(seed.config)
    source = f"static model of sm_{arch}, triton {triton}: predicted from machine code, nothing was measured"
    return {"source": source, "configs": configs}


def _near(rule: Config) -> list[Config]:
    """The rule's first, so that a draw is its."""
    found = [rule]
    for block_n in (rule.block_n, rule.block_n // 2):
        for warps in (4, 8):
            for stages in (3, 4, 5):
                split = max(1, rule.split * block_n // rule.block_n)
                found.append(replace(rule, block_n=block_n, split=split, warps=warps, stages=stages))
    return list(dict.fromkeys(found))


def _score(kernel: Kernel, entry: Entry, config: Config, tokens: int, arch: int, machine: Machine) -> float:
    """0 for what must not be launched."""
    launch = kernel.launches(config)[-1]  # of several, the one that finishes
    function = getattr(load_source(kernel.source), launch.form)
    report = compile_ahead(
        function, launch.signature, launch.constants, arch, config.warps, config.stages, unaligned=("M",)
    )
    row = Row(entry, config, launch, report)
    if row.faults:
        return 0.0
    programs = math.prod(kernel.grid(tokens, config))
    blocks = min(report.blocks_per_multiprocessor, math.ceil(programs / machine.multiprocessors))
    flying = blocks * (config.stages - 1) * launch.constants["BLOCK_N"] * entry.step * entry.bits / 8
    needed = machine.bandwidth * LATENCY / machine.multiprocessors
    return min(row.mix.bound(entry.bits, machine), flying / needed, 1.0)
