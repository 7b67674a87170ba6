"""Workloads: every way to write one, what they make of a graph's sizes, and what is said where they do not fit."""

import re

import pytest
import torch
from torch import nn

from fxcompress.core.capture import capture
from fxcompress.core.errors import WorkloadError
from fxcompress.core.workload import Workload, bind, inputs_of, parse_workload, shape_of, weighted


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (("decode", 1, 1), Workload("decode", 1, 1)),
        (["prefill", 8, 512, 0.3], Workload("prefill", 8, 512, 0.3)),
        ("decode=1x1", Workload("decode", 1, 1)),
        (" prefill = 8x512 : 3e-1 ", Workload("prefill", 8, 512, 0.3)),
        (Workload("a", 2, 3), Workload("a", 2, 3)),
    ],
)
def test_a_workload_is_read(given, made):
    assert Workload.parse(given) == made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("decode", "workload 'decode' is not understood; write name=BATCHxSEQUENCE"),
        ("decode=1", "is not understood; write name=BATCHxSEQUENCE or name=BATCHxSEQUENCE:WEIGHT"),
        ("decode=1x1:e", "is not understood; write name=BATCHxSEQUENCE"),
        (("decode", 1), "workload ('decode', 1) is not understood; write (name, batch, sequence)"),
        (7, "workload 7 is not understood"),
        (("decode", 0, 1), "workload 'decode': batch=0 is no whole number of at least 1"),
        (("decode", 1, 1.5), "workload 'decode': sequence=1.5 is no whole number of at least 1"),
        (("decode", True, 1), "batch=True is no whole number"),
        (("decode", 1, 1, 0), "workload 'decode': weight=0 is no number above 0"),
        (("decode", 1, 1, float("nan")), "weight=nan is no number above 0"),
        (("", 1, 1), "workload '': a name is wanted"),
        ((3, 1, 1), "workload 3: a name is wanted"),
    ],
)
def test_a_workload_that_means_nothing_is_refused_with_what_to_write(given, message):
    with pytest.raises(WorkloadError, match=re.escape(message)):
        Workload.parse(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "workload is empty; write (name, batch, sequence)"),
        ("decode=1x1", "workload='decode=1x1' is no list; write a list of them"),
        (3, "workload=3 is no list"),
        ([("a", 1, 1), ("a", 2, 2)], "two workloads are called 'a'; give each a name of its own"),
    ],
)
def test_a_list_of_workloads_that_means_nothing_is_refused(given, message):
    with pytest.raises(WorkloadError, match=re.escape(message)):
        parse_workload(given)


class Encoder(nn.Module):
    """Ids and a mask of their own dimensions; up to 32 positions."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)

    def forward(self, ids, mask):
        x = self.table(ids) + self.positions.weight[: ids.shape[1]]
        return x * mask.unsqueeze(-1)


@pytest.fixture(scope="module")
def encoder():
    ids = torch.arange(12).reshape(2, 6)
    return capture(Encoder().eval(), {"ids": ids, "mask": torch.ones_like(ids)})


@pytest.fixture(scope="module")
def image():
    return capture(nn.Conv2d(3, 4, 3).eval(), (torch.ones(2, 3, 8, 8),))


def test_every_symbol_gets_the_batch_or_the_sequence(encoder):
    ids, _ = encoder.signature.slots
    (batch, *_), (sequence, *_) = ids.dims
    sizes = bind(encoder, Workload("w", 5, 17))
    assert sizes[batch] == 5
    assert sizes[sequence] == 17
    call = {"ids": torch.arange(6).reshape(1, 6), "mask": torch.ones(1, 6, dtype=torch.long)}
    args, kwargs = inputs_of(encoder, Workload("w", 5, 17), ((), call))
    assert args == ()
    assert kwargs["ids"].shape == kwargs["mask"].shape == (5, 17)
    assert kwargs["ids"][3].tolist() == [*range(6), *range(6), *range(5)]
    assert encoder.signature.symbols(args, kwargs) == sizes
    assert encoder(**kwargs).shape == (5, 17, 8)


def test_channels_are_no_sequence(image):
    sizes = bind(image, Workload("w", 4, 1))
    assert list(sizes.values()) == [4]
    assert shape_of(image, ((torch.ones(6, 3, 8, 8),), {})) == Workload("example", 6, 1)
    (x,), _ = inputs_of(image, Workload("w", 4, 1), ((torch.ones(1, 3, 8, 8),), {}))
    assert x.shape == (4, 3, 8, 8)


def test_the_shape_of_a_call(encoder):
    ids = torch.zeros(3, 9, dtype=torch.long)
    assert shape_of(encoder, ((), {"ids": ids, "mask": ids})) == Workload("example", 3, 9)


def test_outside_the_captured_range_is_refused_with_the_range(encoder, image):
    with pytest.raises(WorkloadError) as caught:
        bind(encoder, Workload("long", 1, 33))
    assert (
        "workload 'long' has a sequence of 33, and input 'ids' was captured for 1 to 32 in dimension 1. Ask for that, "
        "or capture with other example_inputs." in str(caught.value)
    )
    with pytest.raises(WorkloadError, match="captured for 3 in dimension 1, or 1 where the model reads no sequence"):
        bind(image, Workload("w", 4, 16))


def test_calls_are_weighted_by_how_often_they_are_made():
    assert weighted([1.0, 10.0], [Workload("a", 1, 1, 3), Workload("b", 1, 1)]) == pytest.approx(13 / 4)
