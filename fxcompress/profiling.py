"""profile: what this machine's kernels take, measured once and kept; here(): the profile of this very machine.

    profile = fxcompress.profile()               # two minutes; afterwards `lower` and latency budgets know this machine
    profile.product_seconds("int8", tokens=16, rows=1536, columns=384)

Kept in $FXCOMPRESS_CACHE/profiles, or ~/.cache/fxcompress/profiles, one file for each processor, number of threads and
version of torch. Nothing measures by itself but `profile`, and `here` where a latency is asked of an unknown machine.
"""

from __future__ import annotations

import datetime
import functools
import logging
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from fxcompress.codegen.cpu import loops, measure
from fxcompress.codegen.cpu.between import COMPILED, FUSED, PASSES
from fxcompress.codegen.cpu.clock import Between, Company, Memory, cache_bytes, nothing
from fxcompress.codegen.cpu.measure import Sizes
from fxcompress.codegen.cpu.overheads import overheads
from fxcompress.codegen.cpu.pulse import Beat, slowdown, typical
from fxcompress.codegen.triton.build import cache_folder, write_whole
from fxcompress.core.errors import ProfileError
from fxcompress.cost_model.device import PRODUCTS, DeviceProfile, Grid, device_name, file_name, versions

log = logging.getLogger("fxcompress.profiling")

SHIPPED = Path(__file__).parent / "cost_model" / "profiles"
CHECKS = 60  # shapes off the grid on which a profile is judged


def profile(progress: bool = True, *, sizes: Sizes | None = None, keep: bool = True) -> DeviceProfile:
    """Measure this machine with the current number of threads, in about two minutes.

    keep: write it to the cache, where `lower` and `here` find it.
    """
    with _undisturbed():
        made = _measured(sizes or Sizes(), progress)
    if keep:
        write_whole(cached_path(), made.text())
    return made


def here() -> DeviceProfile:
    """The kept profile of this machine and number of threads; measured now if there is none."""
    return cached() or profile()


def cached() -> DeviceProfile | None:
    """The kept profile of this machine, or the one that is shipped for it. A damaged file is named and left out."""
    for path in (cached_path(), SHIPPED / cached_path().name):
        if path.is_file():
            try:
                found = DeviceProfile.load(path)
                found.check_here()
            except ProfileError as error:
                log.warning("%s is not used: %s", path, error)
                continue
            return found
    return None


def cached_path() -> Path:
    """Where the profile of this machine is kept."""
    return cache_folder() / "profiles" / f"{file_name(device_name(), torch.get_num_threads(), versions())}.json"


def table(profile: DeviceProfile) -> str:
    """Microseconds of products of some sizes, and how far off the profile is."""
    rows, cached = [], 2 * profile.caches[0]
    for n, k, tokens in ((384, 384, 16), (768, 768, 1), (768, 3072, 128), (3072, 768, 128), (4096, 4096, 1)):
        found = [
            profile.bare_seconds(kernel, tokens, n, k, working_set=cached) if kernel in profile.products else None
            for kernel in PRODUCTS
        ]
        rows.append((f"{n} x {k}", tokens, *("-" if s is None else f"{s * 1e6:,.0f}" for s in found)))
    heads = ["weight", "tokens", *(f"{kernel}" for kernel in PRODUCTS)]
    told = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    middle, tail = profile.error

    def told_us(name: str) -> str:
        return f"{profile.overhead(name, cached) * 1e6:.1f} us"

    return "\n".join([
        f"{profile.device}, {profile.threads} threads, {told}, {profile.date}",
        "",
        "microseconds of a product, its weight in the last-level cache",
        tabulate(rows, headers=heads, disable_numparse=True, colalign=("left", *["right"] * (len(heads) - 1))),
        "",
        f"a call of a module {told_us('eager.call')} in eager, {told_us('inductor.call')} compiled; "
        f"a view {told_us('eager.view')}",
        f"own error, products of sizes not measured: median {middle:.0%}, 90th percentile {tail:.0%}",
    ])  # fmt: skip


def _measured(sizes: Sizes, progress: bool) -> DeviceProfile:
    names, between, company, memory = measure.kernels(), Between(), Company(), Memory()
    total = measure.ROUNDS * (len(names) + len(PASSES) + len(measure.ATTENTION) + len(COMPILED) + 3) + 1
    with tqdm(total=total, desc="profile", unit="table", disable=not progress, leave=False, mininterval=0) as bar:

        beat, pulses = Beat(), []

        def told(name: str, run: Callable[[], Any]) -> Any:
            bar.set_postfix_str(name)
            pulses.append(beat())
            found = run()
            bar.update()
            return found

        products: dict[str, tuple[Grid, ...]] = {}
        alone: dict[str, Grid] = {}
        attention: dict[str, Grid] = {}
        around: dict[str, tuple[float, ...]] = {}
        compiled: dict[str, dict[int, loops.Loop]] = {}
        several: list[tuple[loops.Loop, tuple[str, ...], Any]] = []
        shares: list[Grid] = []
        for _ in range(measure.ROUNDS):
            found = told("overheads", overheads)
            around = {name: tuple(map(min, levels, around.get(name, levels))) for name, levels in found.items()}
            for name in names:
                levels = told(name, partial(measure.product_grids, name, sizes, between, memory))
                products[name] = tuple(map(_least, products.get(name, levels), levels))
            for name, (run, given) in PASSES.items():
                grid = told(name, partial(measure.pass_grid, run, given, sizes, company))
                alone[f"eager.{name}"] = _least(alone.get(f"eager.{name}", grid), grid)
            for name in measure.ATTENTION:
                grid = told(name, partial(measure.attention_grid, name, sizes, nothing))
                attention[name] = _least(attention.get(name, grid), grid)
            for name, grid in told("compiled attention", partial(loops.attention_grids, sizes)).items():
                attention[name] = _least(attention.get(name, grid), grid)
            for name, (run, given) in COMPILED.items():
                if name not in compiled:
                    compiled[name] = loops.compiled_passes(run, given, sizes)
                grid = told(f"compiled {name}", partial(loops.loop_grid, compiled[name], given, sizes))
                alone[f"inductor.{name}"] = _least(alone.get(f"inductor.{name}", grid), grid)
            several = several or [
                (loops.compiled_pass(run, given, sizes.widths[-1]), parts, given) for run, parts, given in FUSED
            ]
            shares.append(told("fused", partial(loops.fused_grid, several, alone, sizes)))
        made = DeviceProfile(
            device_name(), torch.get_num_threads(), versions(), datetime.date.today().isoformat(), cache_bytes(),
            products, alone, attention, around, functools.reduce(_least, shares), (0.0, 0.0), {},
        )  # fmt: skip
        made = replace(made, pulse=typical(pulses))
        return replace(made, error=told("its own error", partial(_judged, made, sizes, between, memory, beat)))


def _least(one: Grid, other: Grid) -> Grid:
    """Of two rounds, place by place."""
    pairs = zip(one.seconds, other.seconds, strict=True)
    return Grid(one.axes, tuple(b if a is None else a if b is None else min(a, b) for a, b in pairs))


def _judged(made: DeviceProfile, sizes: Sizes, between: Between, memory: Memory, beat: Beat) -> tuple[float, float]:
    """Median and 90th percentile of |predicted / measured - 1| over products of random sizes off the grid, at the speed
    that the machine has when each is measured."""
    dice, off = random.Random(0), []
    largest = sizes.features[-1] // 64
    for at in range(CHECKS):
        name = measure.kernels()[at % len(measure.kernels())]
        rows, columns = (64 * round(largest ** dice.random()) for _ in range(2))
        tokens = round(min(sizes.tokens[-1], 512) ** dice.random())
        found = measure.product_seconds(name, tokens, rows, columns, between, memory)
        now = slowdown(beat(), made.pulse)
        off.append(abs(made.products[name][1].at(tokens, rows, columns) * now / found - 1))
    off.sort()
    return statistics.median(off), off[int(0.9 * (len(off) - 1))]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The caller's random numbers, threads and compiled functions are as before."""
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(rng)
        torch.set_num_threads(threads)
