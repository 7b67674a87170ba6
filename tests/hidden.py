"""For the tests of hidden units: small transformers, captured and calibrated, and how far two runs are apart."""

import functools

import torch
from torch import Tensor
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
        return [t for t in pytree.tree_leaves(run(**batch)) if isinstance(t, Tensor)]


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
