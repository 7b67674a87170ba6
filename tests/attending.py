"""For the tests of attention: what exact attention is, models that attend, graphs with every attention rewritten."""

from functools import cache

import torch
import transformers as tf
from torch import nn

from fxcompress.core.attention import find_attention_sites, observe_attention
from fxcompress.core.capture import capture, example_of
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.passes.linformer import Linformer
from tests.test_capture import SMALL, TEXT, seeded

attend = torch.ops.fxcompress.linformer_attention.default
exact = torch.nn.functional.scaled_dot_product_attention
EPS = 2.0**-24


def kinds(gm):
    """What is proven of the mask of every attention, by its name."""
    return {site.name: site.mask_kind for site in find_attention_sites(gm)}


class Attention(nn.Module):
    """One attention over x (batch, n, 8) with the mask `mask(x, pad)`."""

    def __init__(self, mask, **options):
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, x, pad):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return exact(heads, heads, heads, self.mask(x, pad), **self.options).transpose(1, 2).flatten(2)


def padding(x, pad):
    return pad[:, None, None, :]


@cache
def sharp():
    """A BERT whose attention picks a few keys -> (model, graph). Freshly initialised, it looks at all of them alike."""
    config = tf.BertConfig(**SMALL, **TEXT, initializer_range=0.3)
    model = seeded(lambda: tf.BertModel(config)).eval()
    return model, capture(model, example_of(model))


def rewrite(gm, spec, calls=(), seed=None):
    """A copy of the graph with every attention rewritten."""
    work = gm.copy()
    for site in find_attention_sites(work):
        assert Linformer.refuses(site) is None
        if seed is None:
            tensors = spec.factor(site, observe_attention(work, site, calls))
        else:
            tensors = spec.draw(site, torch.Generator().manual_seed(seed))
        spec.at(site).apply(work, site, tensors)
    finish(work)
    own_tensors(work)
    return work


def assert_close_answers(got, want, batch):
    with torch.no_grad():
        a, b = got(**batch).last_hidden_state, want(**batch).last_hidden_state
    # Two layers of float32 sums over at most 64 terms, normalised to about 1: a few hundred roundings.
    assert float((a - b).abs().max()) < 500 * EPS
