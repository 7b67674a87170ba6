"""Memory that outlives the call that asks for it: prepared weights, counters.

While torch.compile(mode="reduce-overhead") warms a graph up, whatever its thread allocates lies in the memory of its
graphs, and torch raises an error where some of that is still in use when the call is over. The diversion is the
thread's, so another thread is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns, queued on the current stream of `device`, without gradients."""
    if device.type != "cuda":
        with torch.no_grad():
            return make()
    return in_a_thread(make, torch.cuda.current_stream(device))


def in_a_thread(make: Callable[[], T], stream: torch.cuda.Stream) -> T:
    """`make` in a thread of its own, on that stream; raises what it raises."""
    made: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.device(stream.device), torch.cuda.stream(stream), torch.no_grad():
                made.append(make())
        except BaseException as error:  # raised again where it was asked for
            failed.append(error)

    thread = threading.Thread(target=work, name="fxcompress-lasting")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
