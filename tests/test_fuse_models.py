"""Fusion of whole models and of every rewrite: the same bits, specs that read well, saved and loaded."""

import pytest
import torch
from torch import nn

import fxcompress
from benchmarks.models import minilm
from fxcompress.core.show import show
from fxcompress.passes import REWRITES
from fxcompress.passes.fuse import HEADS, OWN, fuse
from tests.fusing import FACTORED, QUANTIZED, D, Net, both, calls, programs, rewritten, same, steps


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, **ends)).eval()


IDS = (torch.arange(2 * 9).reshape(2, 9) * 7) % 64


@pytest.mark.parametrize("specs", [QUANTIZED, {"*lm_head*": None, "*wpe*": None, "*": FACTORED}])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_decoders_keep_their_bits(make, specs):
    gm = rewritten(make(), {"input_ids": IDS}, specs)
    done = fuse(gm)
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :4]):
            same(gm(input_ids=ids), done(input_ids=ids))
    left = [n for n in done.graph.nodes if n.target in OWN]
    assert all("embedding" in str(n.target) for n in left)


def test_llama_s_specs_read_well(golden):
    done = fuse(rewritten(llama(), {"input_ids": IDS}))
    golden("\n\n".join(text.replace(" | ", "\n  | ") for text in programs(done)[:4]))


def test_gpt_2_s_written_out_gelu_is_folded():
    done = fuse(rewritten(gpt2(), {"input_ids": IDS}))
    per_layer = [["layer_norm", "linear", "unrows"], ["linear", "unrows", "add"]]
    gelu = ["layer_norm", "linear", "unrows", "mul", "pow", "mul", "add", "mul", "tanh", "add", "mul"]
    assert steps(done)[:4] == [*per_layer, gelu, per_layer[1]]


def test_minilm_keeps_its_bits(data):
    inputs = minilm.batches(["A man is playing a harp.", "Two dogs run.", "It rains today in the north."])[0]
    specs = {"embeddings*": None, "pooler*": None, "*attention.output*": FACTORED, "*": QUANTIZED}
    gm = rewritten(data(minilm.model), inputs, specs)
    done = fuse(gm)
    with torch.no_grad():
        same(gm(**inputs), done(**inputs))
    normed = ["add", "layer_norm"]
    assert steps(done) == [["linear"] * 3, ["low_rank_linear", *normed], ["linear", "gelu"], ["linear", *normed]] * 6


def test_a_fused_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = Net(lambda n, x: (n.d(nn.functional.silu(n.a(x)) * n.b(x)) + x, n.c(x).softmax(-1), n.b(x).softmax(-1)))
    x = torch.randn(4, 6, D)
    told = fxcompress.compile(model, "2x", example_inputs=(x,), rewrites=["quantize"], progress=False).meta
    compiled = rewritten(model, (x,))
    compiled.meta.update(plan=told["plan"], report=told["report"])
    done = fuse(compiled)
    assert steps(done) == [["linear", "silu", "linear", "mul"], ["linear", "add"], ["linear", "linear"]]
    fxcompress.save(done, tmp_path / "m")
    loaded = fxcompress.load(tmp_path / "m")
    with torch.no_grad():
        same(compiled(x), loaded(x))
        same(compiled(x[:2, :3]), loaded(x[:2, :3]))
    assert programs(loaded) == programs(done)
    assert show(fuse(loaded)) == show(loaded)


SPECS = [  # every rewrite of a linear weight, and every way of keeping one
    "quantize{bits=4, group_size=32}", "quantize{bits=3, group_size=0, symmetric=True}", "float8",
    "quantize_residual{bits=4, group_size=32, rank=4}", "int8_dynamic", "float8_dynamic",
    "low_rank{rank=4} | float8",
    "block_low_rank{blocks=2, rank=4} | quantize{bits=8, group_size=0}", "monarch{blocks=4, rank=1}",
    "tensor_train{rank=8}", "quaternion | quantize{bits=4, group_size=32}",
    "prune{sparsity=0.5} | quantize{bits=8, group_size=0}", "prune_2_4 | quantize{bits=4, group_size=32}",
    "prune_blocks{sparsity=0.5, block=4}",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_every_rewrite_of_a_linear_weight_is_fused(spec):
    _, done = both(lambda n, x: n.d(nn.functional.silu(n.a(x)) * n.b(x)) + x, specs=spec)
    (gated, down) = steps(done)
    assert gated == [gated[0], "silu", gated[0], "mul"]
    assert down == [gated[0], "add"]
    assert calls(done) == []


def test_the_specs_above_leave_no_rewrite_and_no_product_out():
    named = {part.split("{")[0].strip() for spec in SPECS for part in spec.split("|")}
    # rows of tables; a smaller dense product
    assert named == {r.name for r in REWRITES} - {"quantize_rows", "hidden_units"}
    structured = {str(op._schema.name).split("::")[1].removesuffix("_linear") for op in HEADS & OWN}
    assert structured <= named
