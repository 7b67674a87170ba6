"""Which masks of attention are proven to be padding, about keys alone, and which are not."""

import math

import pytest
import torch
import transformers as tf
from torch import fx

from fxcompress.core.attention import find_attention_sites, key_mask
from fxcompress.core.calibrate import bind_batch
from fxcompress.core.capture import capture, example_of
from fxcompress.core.key_mask import ignores_queries
from fxcompress.passes.linformer import Linformer
from tests.attending import Attention, kinds, padding
from tests.test_capture import SMALL, TEXT, captured, seeded, text_batch


def test_padding_masks_are_proven_and_others_are_not():
    for name in ("bert", "vit"):
        assert set(kinds(captured(name)[1]).values()) == {"keys"}
    for name in ("gpt2", "llama", "qwen3"):
        assert set(kinds(captured(name)[1]).values()) == {"causal"}
    assert set(kinds(captured("encoder")[1]).values()) == {"none"}
    assert kinds(captured("t5")[1]) == {
        "encoder.block.0.layer.0.SelfAttention": "queries",  # a bias by distance
        "encoder.block.1.layer.0.SelfAttention": "queries",
        "decoder.block.0.layer.0.SelfAttention": "causal",
        "decoder.block.0.layer.1.EncDecAttention": "keys",
        "decoder.block.1.layer.0.SelfAttention": "causal",
        "decoder.block.1.layer.1.EncDecAttention": "keys",
    }


def test_a_window_wider_than_the_example_is_still_no_padding_mask():
    config = tf.ModernBertConfig(**SMALL, **TEXT, local_attention=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                 cls_token_id=1, sep_token_id=2)  # fmt: skip
    model = seeded(lambda: tf.ModernBertModel(config)).eval()
    example = example_of(model)
    assert example["input_ids"].shape[1] < 16  # every query sees every key here
    assert list(kinds(capture(model, example)).values()) == ["keys", "queries"]


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_a_proven_mask_has_equal_rows_on_padded_batches(name):
    model, gm = captured(name)
    for site in find_attention_sites(gm):
        args, kwargs = bind_batch(gm, text_batch(model, 3, 17), 0)
        seen = {}

        class Reader(fx.Interpreter):
            def run_node(self, n, seen=seen, wanted=site.mask):
                value = super().run_node(n)
                if n is wanted:
                    seen[n] = value
                return value

        with torch.no_grad():
            Reader(gm).run(*torch.utils._pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
        mask = seen[site.mask]
        same = torch.equal(mask, key_mask(mask).unsqueeze(-2).expand_as(mask))
        assert same == (site.mask_kind == "keys")


def filled_in_place(x, pad):
    return torch.zeros_like(pad, dtype=x.dtype).masked_fill_(~pad, -math.inf)[:, None, None]


def as_number(x, pad):
    return (1 - pad[:, None, None].to(x.dtype)) * -1e9


def future_written_in_place(x, pad):
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask.masked_fill_(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -math.inf)
    return mask


def future_written_into_a_view(x, pad):
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask[:1].masked_fill_(torch.ones(1, x.shape[1], dtype=torch.bool).triu(1), -math.inf)
    return mask


def same_segment(x, pad):
    return pad[:, None, :, None] == pad[:, None, None, :]


def from_the_input(x, pad):
    return x @ x.mT > 0


MASKS = {
    padding: "keys",
    filled_in_place: "keys",
    as_number: "keys",
    future_written_in_place: "causal",
    future_written_into_a_view: "queries",
    same_segment: "queries",
    from_the_input: "queries",
}


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)
def test_hand_made_masks_are_told_apart(mask):
    gm = capture(Attention(mask).eval(), (torch.randn(2, 7, 8), torch.rand(2, 7) > 0.3))
    assert list(kinds(gm).values()) == [MASKS[mask]]


def test_is_causal_is_causal_without_a_mask():
    gm = capture(Attention(lambda x, pad: None, is_causal=True).eval(), (torch.randn(2, 7, 8), torch.ones(2, 7)))
    (site,) = find_attention_sites(gm)
    assert site.causal
    assert Linformer.refuses(site) == "its attention is causal: a landmark would show a query the positions after it"


def test_what_is_drawn_or_computed_by_the_row_is_not_proven():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4, 4, device="meta")
    for target, args in ((torch.ops.aten.bernoulli.default, (x,)), (torch.ops.aten.cumsum.default, (x, 1))):
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(2, 4, 4, device="meta")
        assert not ignores_queries(node)
