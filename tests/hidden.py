"""For the tests of hidden units: small models, captured and calibrated, and how far two runs are apart."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.site import find_sites
from fxcompress.passes.unit_groups import find_roles, take_roles

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZE, **TEXT, initializer_range=0.3)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def llama(keys=4):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, **TEXT, num_key_value_heads=keys, initializer_range=0.3)).eval()


def batches(count=6, length=11):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (8, length), generator=generator)} for _ in range(count)]


def captured(model):
    """-> (graph, calibration)"""
    gm = capture(model, batches(1)[0])
    return gm, calibrate(gm, find_sites(gm), batches(), progress=False)


def outputs(run, batch):
    """Every output tensor."""
    with torch.no_grad():
        found = run(batch) if isinstance(batch, Tensor) else run(**batch)
        return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]


def distance(run, reference, batch):
    """The largest ||y - y'|| / ||y|| over the outputs."""
    pairs = zip(outputs(run, batch), outputs(reference, batch), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def with_roles(gm, known):
    """Sites by name, with their roles and statistics."""
    sites = take_roles(find_sites(gm), find_roles(gm, known.informed))
    return {site.name: known.informed(site) for site in sites}


MODELS = [bert, gpt2, llama, functools.partial(llama, 2), functools.partial(llama, 1)]
MODEL_IDS = ["bert", "gpt2", "llama", "llama-grouped", "llama-one-key"]


class Scaled(nn.Module):
    """A hidden layer with biases, and a vector of its own between the products."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(32, 64), nn.Linear(64, 32), nn.Parameter(torch.rand(64))

    def forward(self, x):
        return self.down(self.up(x).relu() * self.scale)


class Twice(nn.Module):
    """The same hidden layer two times: no bias of it can be corrected."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = x + self.down(self.up(x).relu())
        return x + self.down(self.up(x).relu())


class Named(nn.Module):
    """Names unlike those of nn.Linear: a corrected bias gets a new one."""

    def __init__(self):
        super().__init__()
        self.W_in, self.b_in = nn.Parameter(0.2 * torch.randn(64, 32)), nn.Parameter(torch.randn(64))
        self.W_out, self.b_out = nn.Parameter(0.2 * torch.randn(32, 64)), nn.Parameter(torch.randn(32))

    def forward(self, x):
        return F.linear(F.linear(x, self.W_in, self.b_in).relu(), self.W_out, self.b_out)


class Gated(nn.Module):
    """Two sites that make the units, with one bias between them."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.gate.bias = self.up.bias

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


def layer(kind=Scaled):
    torch.manual_seed(0)
    return kind().eval()


def vectors():
    """Inputs of these layers, correlated: some units say what others say."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 32, generator=generator)
    noise = 0.1 * torch.randn(4, 128, 32, generator=generator)
    return list(torch.randn(4, 128, 6, generator=generator) @ mix + noise)
