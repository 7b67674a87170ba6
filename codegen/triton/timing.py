"""Seconds of a call on the GPU, as a model meets it: replayed in a CUDA graph, its weights not in the cache.

    calls     the same work on enough copies of its weights that they do not fit the cache together (`copies`)
    graph     all of them in turn, as often as makes a replay worth timing
    seconds   median over replays, by CUDA events, of a replay over its calls
    spread    half the distance of the quartiles over the median: differences below it are noise

Work that cannot be captured is timed by events around as many ordinary calls; `captured` says so. A roofline is what
the same card does at the same time of day: `copy_bandwidth` and `matmul_rate`.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.triton.counters import lent
from fxcompress.core.errors import KernelError

log = logging.getLogger("fxcompress.timing")

CACHES = 3  # copies fill the cache this often: one in turn has been driven out by the time it comes round
MOST_COPIES = 64
SECONDS = 0.1  # of replays
CALLS = 40  # of a graph, where they are short: launching a graph takes as long as a small product

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """seconds: of one call, the median. spread: relative. captured: False if it was no CUDA graph."""

    seconds: float
    spread: float
    captured: bool


Timer = Callable[[Sequence[Call]], Timing]


def need_cuda(doing: str) -> torch.device:
    """The current GPU. Raises `KernelError` where there is none."""
    if not torch.cuda.is_available():
        raise KernelError(
            f"{doing} needs a CUDA GPU, and torch {torch.__version__} sees none here: run it on the machine that will "
            "run the model, with a torch built for CUDA."
        )
    return torch.device("cuda", torch.cuda.current_device())


def copies(stored: int, cache: int) -> int:
    """How many copies of `stored` bytes make a cache of `cache` bytes cold."""
    return min(MOST_COPIES, 1 + math.ceil(CACHES * cache / max(stored, 1)))


def measure(calls: Sequence[Call]) -> Timing:
    """One of `calls`, which all do the same; each is called in turn. Compiles and prepares before it captures."""
    stream = _own_stream(need_cuda("timing kernels"))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
        turns = _turns(_between(_all(calls, 1)) / len(calls), len(calls))
    torch.cuda.synchronize()
    with lent(stream.device):
        graph = _captured(_all(calls, turns), stream)
        found = None if graph is None else _repeated(graph.replay)
        if graph is not None:
            graph.reset()
    return _summary(found or _repeated(_all(calls, turns)), turns * len(calls), found is not None)


def copy_bandwidth(timer: Timer = measure, device: str = "cuda", size: int = 1 << 30) -> float:
    """Bytes a second that a copy within the device's memory reads and writes together."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timer([lambda: target.copy_(source)]).seconds


def matmul_rate(dtype: torch.dtype, timer: Timer = measure, device: str = "cuda", size: int = 8192) -> float:
    """Operations a second of the library's product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / timer([_product(a, b, dtype)]).seconds


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Call:
    if dtype is torch.int8:
        left, right = ((t * 40).clamp(-127, 127).to(torch.int8) for t in (a, b))
        return lambda: torch._int_mm(left, right.T)
    if dtype.itemsize == 1:
        one = torch.ones((), device=a.device)
        left, right = a.to(dtype), b.to(dtype).T  # the right one has to be stored by columns
        return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
    left, right = a.to(dtype), b.to(dtype)
    return lambda: left @ right


def _turns(seconds: float, calls: int) -> int:
    """How often the calls go round in a graph. Below half a millisecond an ordinary call is Python's time."""
    wanted = CALLS if seconds < 5e-4 else math.ceil(5e-3 / seconds)
    return max(1, math.ceil(wanted / calls))


def _all(calls: Sequence[Call], turns: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    return run


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A capture must not begin on the default stream; libraries and counters set themselves up once for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(run: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        log.warning("timed without a CUDA graph: %s", f"{error}".strip().partition("\n")[0])
        return None
    return graph


def _between(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _repeated(run: Callable[[], object]) -> list[float]:
    """Seconds of each of 7 to 50 runs; one more before them is not counted."""
    _between(run)
    found = [_between(run) for _ in range(7)]
    while sum(found) < SECONDS and len(found) < 50:
        found.append(_between(run))
    return found


def _summary(found: Sequence[float], calls: int, captured: bool) -> Timing:
    low, middle, high = statistics.quantiles(found, n=4)
    return Timing(middle / calls, (high - low) / 2 / middle, captured)
