"""Small models of transformers with random weights, one of every way to hold a weight, and what to call them with."""

from __future__ import annotations

from typing import ClassVar

import torch
import transformers

import fxcompress
from tests.test_module_mode import Net

WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
SIZES, IMAGES = {**WIDE, "vocab_size": 512}, {**WIDE, "image_size": 32, "patch_size": 8}


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def mixtral():
    """Its experts are stacked weights, which no linear module owns."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    return transformers.MixtralForCausalLM(config).eval()


def bert():
    """Its head shares the table and has a bias, which is tied to another."""
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=512, decoder_start_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512, use_cache=False)
    return transformers.GPT2LMHeadModel(config).eval()


def gemma():
    """Its table is a subclass of Embedding with a scale of its own, in a buffer that no file holds."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**WIDE, vocab_size=4096, num_key_value_heads=2, head_dim=32, use_cache=False)
    return transformers.Gemma2ForCausalLM(config).eval()


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)).eval()


class Pretrained(transformers.PreTrainedModel, Net):
    """Linears, convolutions, and a table tied to its head, as transformers would have them."""

    config_class = transformers.PreTrainedConfig
    _tied_weights_keys: ClassVar = {"head.weight": "table.weight"}

    def __init__(self, config) -> None:
        config.tie_word_embeddings = True
        super().__init__(config)
        self.post_init()


def inputs_of(model) -> dict[str, torch.Tensor]:
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(model.dtype)}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return {"input_ids": ids(4, 16), "decoder_input_ids": ids(4, 9)}
    return {"input_ids": ids(4, 16)}


def small(model, budget="2.5x", rewrites=("quantize", "quantize_rows", "low_rank")):
    batches = [inputs_of(model)] * 2
    compiled = fxcompress.compile(model, budget, calibration=batches, rewrites=rewrites, progress=False)
    return fxcompress.apply(model, compiled)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(model)).logits
