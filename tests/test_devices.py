"""A graph follows its weights to another device; "meta" stands for one here, which computes shapes alone."""

import pytest
import torch
from torch import nn

from fxcompress.core.capture import capture
from fxcompress.core.devices import device_of
from fxcompress.passes.fuse import fuse
from tests.fusing import rewritten
from tests.test_fuse_models import IDS, gpt2, llama


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    return BertModel(BertConfig(vocab_size=64, **sizes)).eval()


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).eval()


TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CASES = [(llama, TEXT), (gpt2, TEXT), (bert, TEXT), (vit, {"pixel_values": torch.randn(2, 3, 32, 32)})]


@pytest.mark.parametrize(("make", "inputs"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_a_compressed_model_runs_where_it_is_moved(make, inputs):
    gm = fuse(rewritten(make(), inputs))
    here = gm(**inputs)
    moved = gm.to("meta")
    there = moved(**{name: value.to("meta") for name, value in inputs.items()})
    assert moved is gm
    assert [(v.shape, v.dtype) for v in there.values()] == [(v.shape, v.dtype) for v in here.values()]
    assert {v.device.type for v in there.values()} == {"meta"}


def test_moving_nowhere_changes_nothing():
    gm = capture(gpt2(), {"input_ids": IDS})
    before = gm.code
    gm.to("cpu")
    gm.to(torch.float32)
    assert gm.code == before


def test_a_copy_is_moved_by_itself():
    gm = capture(gpt2(), {"input_ids": IDS})
    twin = gm.copy()
    twin.to("meta")
    assert "device=device(type='cpu')" in gm.code.replace(" ", "")


def test_the_device_of_a_module():
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.GELU()) is None
    assert device_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))) is None
