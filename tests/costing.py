"""For the tests of costs: small models of each kind, captured, with inputs of any size."""

import functools

import torch
from torch import nn

from fxcompress.core.capture import capture
from tests.test_fuse_models import IDS, gpt2, llama


def ids(batch, sequence):
    return {"input_ids": (torch.arange(batch * sequence).reshape(batch, sequence) * 7) % 64}


def masked(batch, sequence):
    whole = torch.ones(batch, sequence, dtype=torch.long)
    return {**ids(batch, sequence), "attention_mask": whole}


def images(batch, _):
    return {"input": torch.linspace(-1, 1, batch * 3 * 32 * 32).reshape(batch, 3, 32, 32)}


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=100, num_hidden_layers=2, **sizes)).eval()


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()  # fmt: skip


MODELS = {"llama": (llama, ids), "gpt2": (gpt2, ids), "bert": (bert, masked), "convolutions": (convolutions, images)}


@functools.cache
def captured(name):
    """The graph of a model, as it is. Nobody may edit it."""
    make, inputs = MODELS[name]
    return capture(make(), inputs(*IDS.shape))


def sizes_of(gm, inputs):
    """{symbol: its size} of a call."""
    shapes = [node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder")]
    pairs = (pair for shape, x in zip(shapes, inputs.values(), strict=True) for pair in zip(shape, x.shape))
    return {str(symbol): size for symbol, size in pairs if not isinstance(symbol, int)}
