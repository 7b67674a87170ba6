"""What the model is probed on: as much of the held-out calls as is affordable, without padding that nobody reads."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fxcompress import api
from fxcompress.core.site import find_sites
from fxcompress.passes.propose import probed, unpadded

LENGTHS = (5, 9, 7)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()
    gm, known = api.observe(model, call_of((6, 6)), [call_of((12, 12), seed) for seed in range(8)], False)
    return gm, known


def call_of(lengths, seed=0, width=12):
    """Padded at the end to `width`."""
    ids = torch.randint(1, 50, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_columns_that_no_example_reads_are_left_out(bert):
    gm, _ = bert
    call = call_of(LENGTHS)
    args, cut = unpadded(gm, ((), call))
    assert args == ()
    assert {name: tuple(t.shape) for name, t in cut.items()} == dict.fromkeys(call, (3, 9))
    with torch.no_grad():
        whole, short = gm(**call).last_hidden_state, gm(**cut).last_hidden_state
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(short[i, :length], whole[i, :length])


@pytest.mark.parametrize("change", ["no mask", "left", "full", "additive", "nothing read"])
def test_other_calls_stay_as_they_are(bert, change):
    gm, _ = bert
    call = call_of(LENGTHS if change != "full" else (12, 12, 12))
    mask = call["attention_mask"]
    if change == "no mask":
        gm, _ = api.observe(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.ones(2, 4),), None, False)
        call = {"input": torch.ones(2, 4)}
    elif change == "left":
        call = {name: t.flip(1) for name, t in call.items()}
    elif change == "additive":
        call["attention_mask"] = (1.0 - mask) * -1e4
    elif change == "nothing read":
        call["attention_mask"] = torch.zeros_like(mask)
    _, cut = unpadded(gm, ((), call))
    assert cut.keys() == call.keys()
    assert all(torch.equal(cut[name], t) for name, t in call.items())


def test_what_is_probed_has_no_padding_to_spare(bert):
    gm, known = bert
    known.held_out = [((), call_of(LENGTHS))]
    ((_, kwargs),) = probed(gm, find_sites(gm), known)
    assert kwargs["input_ids"].shape == (3, 9)
