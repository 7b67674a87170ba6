"""Every check with what it is made of, by name: pytest and `python -m tests.gpu` run the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks._gpu_families import FAMILIES
from fxcompress.codegen.triton.catalogue import ENTRIES, Entry
from tests.gpu import checks, model
from tests.gpu.ground import Ground

SMALL = (256, 512)
WHOLE = ("scipy", "safetensors", "tabulate", "tqdm")  # what compiling a model needs besides torch
# Which rewrites (none named: all that compile weighs), the budget, and the error against the CPU: of another order of
# adding up; where tokens are rounded, of a number on the other side of a tie, 1 / 127 of the largest of 256.
MODELS = (
    ((), "5x", 1e-4),
    (("quantize",), "5x", 1e-4),
    (("low_rank", "float8"), "5x", 1e-4),
    (("int8_dynamic",), "3x", 2e-3),
)


@dataclass(frozen=True)
class Case:
    """missing: packages without which it cannot run."""

    name: str
    run: Callable[[Ground], None]
    missing: tuple[str, ...] = ()


def cases(entries: Iterable[Entry] = ENTRIES) -> Iterator[Case]:
    """Small ones first: `compute-sanitizer python3 -m tests.gpu small` runs them alone."""
    for family in FAMILIES:
        product = family.spec(*SMALL)
        yield Case(f"small {family.name}", lambda g, p=product: checks.dispatch_is_right(p, g))
    kept = tuple(entries)
    for entry in kept:
        for config in entry.configs:
            name = f"config {entry.name} {config.block_m} x {config.block_n} / {config.split}, {config.warps} warps"
            yield Case(name, lambda g, e=entry, c=config: checks.config_is_right(e.product, c, g))
    for what, check in _CHECKS.items():
        for entry in kept:
            yield Case(f"{what} {entry.name}", lambda g, e=entry, c=check: c(e.product, g))
    missing = tuple(name for name in WHOLE if importlib.util.find_spec(name) is None)
    for rewrites, budget, room in MODELS:
        chosen = "/".join(rewrites) or "all rewrites"
        small = model.Small(rewrites, budget, room)
        yield Case(f"model {chosen}", small.runs_as_on_the_cpu, missing)
        yield Case(f"freed {chosen}", small.goes_with_its_memory, missing)


_CHECKS: dict[str, Callable[[str, Ground], None]] = {
    "dispatch": checks.dispatch_is_right,
    "same bits": checks.bits_stay,
    "graph": checks.graph_follows_its_inputs,
    "two graphs": checks.graphs_do_not_meet,
    "streams": checks.streams_do_not_meet,
    "memory": checks.memory_stays,
}
