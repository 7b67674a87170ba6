"""Timing of calls without a GPU: what is counted, what is captured, and what happens where nothing can be."""

import contextlib
import logging
import types

import pytest
import torch

from fxcompress.codegen.triton import counters, timing
from fxcompress.codegen.triton.lasting import in_a_thread, lasting
from fxcompress.core.errors import KernelError


class FakeCuda:
    """A clock that a call moves on by 10 us, a replay by what it holds."""

    def __init__(self, refuses=False):
        self.clock, self.recording, self.refuses, self.replays = 0.0, None, refuses, 0

    def call(self):
        if self.recording is not None:
            self.recording.append(1)
        else:
            self.clock += 10e-6

    def install(self, patch):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                cuda.replays += 1
                cuda.clock += 4e-6 * len(self.held)

            def reset(self):
                self.held = None

        @contextlib.contextmanager
        def graph(made, stream):
            made.held = cuda.recording = []
            yield
            cuda.recording = None
            if cuda.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

        stream = types.SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cuda", 0))
        for name, value in {
            "is_available": lambda: True, "current_device": lambda: 0, "current_stream": lambda: stream,
            "Stream": lambda device: stream, "stream": lambda _: contextlib.nullcontext(), "Event": Event,
            "synchronize": lambda: None, "CUDAGraph": Graph, "graph": graph,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    timing._own_stream.cache_clear()
    made = FakeCuda()
    made.install(monkeypatch)
    yield made
    timing._own_stream.cache_clear()


def test_a_call_is_a_replay_over_its_calls(cuda):
    found = timing.measure([cuda.call] * 3)
    assert found == timing.Timing(pytest.approx(4e-6), pytest.approx(0), True)
    assert cuda.replays == 51  # one that is not counted, and as many as there may be of such short ones


def test_what_cannot_be_captured_is_timed_as_it_is(cuda, caplog):
    cuda.refuses = True
    found = timing.measure([cuda.call])
    assert (found.seconds, found.captured) == (pytest.approx(10e-6), False)
    assert caplog.messages == ["timed without a CUDA graph: operation not permitted when stream is capturing"]


def test_long_calls_make_short_graphs():
    assert timing._turns(10e-6, 8) == 5
    assert timing._turns(2e-3, 1) == 3
    assert timing._turns(1.0, 8) == 1


def test_copies_fill_the_cache_three_times_over():
    assert timing.copies(8 << 20, 60 << 20) == 24
    assert timing.copies(1 << 40, 60 << 20) == 2
    assert timing.copies(0, 60 << 20) == timing.MOST_COPIES


def test_without_a_gpu_timing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match=r"timing kernels needs a CUDA GPU, and torch .* sees none here: run it on"):
        timing.measure([lambda: None])


def test_rates_are_of_what_was_moved_and_multiplied():
    def second(calls):
        calls[0]()
        return timing.Timing(1.0, 0.0, True)

    assert timing.copy_bandwidth(second, "cpu", 1000) == 2000
    assert timing.matmul_rate(torch.bfloat16, second, "cpu", 32) == 2 * 32**3


def test_lent_counters_come_back(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(counters, "_slabs", {device: (torch.zeros(100), 10)})
    with counters.lent(device):
        counters._take(50, device, grow=False)
        assert counters._slabs[device][1] == 60
    assert counters._slabs[device][1] == 10


def test_what_lasts_is_made_in_a_thread_that_raises_here(monkeypatch):
    import threading

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    stream = types.SimpleNamespace(device=None)
    name, grad = in_a_thread(lambda: (threading.current_thread().name, torch.is_grad_enabled()), stream)
    assert (name, grad) == ("fxcompress-lasting", False)
    with pytest.raises(ZeroDivisionError):
        in_a_thread(lambda: 1 / 0, stream)
    assert lasting(lambda: threading.current_thread().name, torch.device("cpu")) == threading.current_thread().name


def test_timing_keeps_apart_from_the_log_of_fallbacks():
    assert timing.log is not logging.getLogger("fxcompress.kernels")
