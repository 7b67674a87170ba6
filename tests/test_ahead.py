"""Work ahead: results in order, one at a time or two, with the caller's modes, and torch's threads given back."""

import threading

import pytest
import torch
from torch import nn

from fxcompress import Budget, api
from fxcompress.carrying_out import carry_out
from fxcompress.core.ahead import AT_ONCE, IN_HAND, ahead
from fxcompress.passes import REWRITES
from tests.sites import normal

IDS = ["one thread", "two threads"]


@pytest.fixture
def with_threads():
    """Sets torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], ids=IDS)
def test_results_come_in_the_order_of_their_tasks(with_threads, threads):
    with_threads(threads)
    assert [*ahead((lambda n=n: n * n) for n in range(9))] == [n * n for n in range(9)]
    assert torch.get_num_threads() == threads


def test_two_tasks_run_at_once_with_half_of_the_threads_each(with_threads):
    with_threads(4)
    met = threading.Barrier(AT_ONCE, timeout=60)  # a task alone would wait there for ever

    def task():
        met.wait()
        return torch.get_num_threads()

    assert [*ahead([task] * 4)] == [2] * 4
    assert torch.get_num_threads() == 4


def test_no_more_is_begun_than_is_in_hand(with_threads):
    with_threads(2)
    begun = []
    found = ahead((lambda n=n: begun.append(n) or n) for n in range(3 * IN_HAND))
    next(found)
    assert len(begun) <= IN_HAND
    found.close()
    assert len(begun) <= IN_HAND
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [1, 2], ids=IDS)
def test_an_error_is_the_callers_and_the_threads_come_back(with_threads, threads):
    with_threads(threads)
    with pytest.raises(ZeroDivisionError):
        [*ahead([lambda: 1, lambda: 1 // 0, lambda: 1])]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_modes_hold_in_every_task(with_threads, mode):
    with_threads(2)
    with mode():
        want = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert [*ahead([lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())] * 3)] == [want] * 3


def test_one_thread_and_two_price_alike_and_make_the_same_tensors(with_threads):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    original, known = api.observe(model, None, normal(64, 96).split(16), progress=False)
    budget, made = Budget.parse("6x"), []
    for threads in (1, 2):
        with_threads(threads)
        plan = api.price(original, REWRITES, known, budget, progress=False)
        made.append((plan, carry_out(original, known, plan, budget)))
    (plan, one), (other, two) = made
    priced, repriced = ([(c.site, c.spec, c.bytes, c.error) for c in p.candidates] for p in (plan, other))
    assert priced == repriced
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
