"""Work on several weights at once, handed over in order.

What is done to one weight is thousands of operations, most of them on a row of numbers and too short to be split over
cores: one thread does a 768 x 768 weight in nearly the time of two. So two weights are worked on at once, each with
half of the threads. With two threads or one every product is made by a single one, and the bits are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

AT_ONCE = 2  # each holds matrices as large as its weight's metric: four of 3072 inputs would be over 1 GB
IN_HAND = 16  # begun or done before they are asked for: BERT's vocabulary takes as long as twelve weights after it


def ahead(tasks: Iterable[Callable[[], T]]) -> Generator[T]:
    """The result of every task, in order, while those behind it are worked on. They must not depend on one another.

    Until it is exhausted or closed torch has that many threads fewer for its caller as well. Raises what a task raises.
    """
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    if threads < AT_ONCE:
        yield from (task() for task in tasks)
        return

    def run(task: Callable[[], T]) -> T:
        torch.set_num_threads(threads // AT_ONCE)  # a new thread's own; so are the modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return task()

    waiting: deque[Future[T]] = deque()
    torch.set_num_threads(threads // AT_ONCE)
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for task in tasks:
                    waiting.append(pool.submit(run, task))
                    if len(waiting) >= IN_HAND:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)
