"""Groups of hidden units: what is found in real architectures, what is refused and why, and how units lie."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from fxcompress.core.capture import capture, example_of
from fxcompress.passes.dependency import Span, dependency_graph, factorise, find_groups
from fxcompress.passes.dimension_ties import Dim, Ties

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def bert(**options):
    return BertModel(BertConfig(**SIZE, **TEXT, **options))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def llama(keys=4):
    return LlamaForCausalLM(LlamaConfig(**SIZE, **TEXT, num_key_value_heads=keys))


def vit():
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZE))


def t5():
    return T5EncoderModel(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )


def groups_of(model, inputs=None):
    """Of a captured model: {name: (units, width, producers)}, and the refusals."""
    groups, refused = find_groups(capture(model.eval(), example_of(model) if inputs is None else inputs))
    return {g.name: (g.units, g.width, g.producers) for g in groups}, refused


def small(model, columns=6):
    """Groups and refusals of a module of one input (batch, columns)."""
    return groups_of(model, (torch.randn(4, columns),))


LLAMA = {
    "self_attn.o_proj": (4, 8, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.down_proj": (48, 1, ("mlp.gate_proj", "mlp.up_proj")),
}
ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value")
BERT = {
    "attention.output.dense": (4, 8, ATTENTION),
    "output.dense": (48, 1, ("intermediate.dense",)),
}


@pytest.mark.parametrize(
    ("model", "layer", "expected"),
    [
        pytest.param(bert, "encoder.layer.{}.", BERT, id="bert"),
        pytest.param(lambda: bert(attn_implementation="eager"), "encoder.layer.{}.", BERT, id="bert-eager"),
        pytest.param(
            gpt2,
            "transformer.h.{}.",
            {"attn.c_proj": (4, 8, ("attn.c_attn",)), "mlp.c_proj": (128, 1, ("mlp.c_fc",))},
            id="gpt2",
        ),
        pytest.param(llama, "model.layers.{}.", LLAMA, id="llama"),
        pytest.param(  # two keys for four queries: a unit is a key with both its queries
            lambda: llama(2),
            "model.layers.{}.",
            {**LLAMA, "self_attn.o_proj": (2, 16, LLAMA["self_attn.o_proj"][2])},
            id="llama-grouped",
        ),
        pytest.param(  # one key for all: it stays, only queries go
            lambda: llama(1),
            "model.layers.{}.",
            {**LLAMA, "self_attn.o_proj": (4, 8, ("self_attn.q_proj",))},
            id="llama-one-key",
        ),
        pytest.param(
            vit,
            "layers.{}.",
            {
                "attention.o_proj": (4, 8, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
                "mlp.fc2": (48, 1, ("mlp.fc1",)),
            },
            id="vit",
        ),
        pytest.param(
            t5,
            "encoder.block.{}.layer.1.DenseReluDense.",
            {"wo": (48, 1, ("wi_0", "wi_1"))},
            id="t5",
        ),
    ],
)
def test_every_feed_forward_layer_and_every_attention_is_a_group_and_nothing_else(model, layer, expected):
    groups, _ = groups_of(model())
    assert groups == {
        layer.format(i) + name: (units, width, tuple(layer.format(i) + p for p in producers))
        for i in range(2)
        for name, (units, width, producers) in expected.items()
    }


def test_the_residual_stream_is_one_refusal():
    ((stream,), (other,)) = groups_of(bert())[1], groups_of(gpt2())[1]
    makers, readers = ("attention.output.dense", "output.dense"), (*ATTENTION, "intermediate.dense")
    assert stream.producers == tuple(f"encoder.layer.{i}.{name}" for i in range(2) for name in makers)
    readers = tuple(f"encoder.layer.{i}.{name}" for i in range(2) for name in readers)
    assert stream.consumers == (*readers, "pooler.dense")
    assert other.producers == tuple(f"transformer.h.{i}.{name}.c_proj" for i in range(2) for name in ("attn", "mlp"))
    assert {stream.why, other.why} == {"embedding (embedding) looks it up in a table"}


def test_a_norm_keeps_its_stream_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    groups, refused = small(Block())
    assert groups == {}
    assert [r.why for r in refused] == ["layer_norm (layer_norm) reads all of it at once"]


def test_heads_with_a_table_of_position_biases_are_refused():
    _, refused = groups_of(t5())
    heads = next(r for r in refused if "encoder.block.0.layer.0.SelfAttention.q" in r.producers)
    assert heads.consumers == tuple(f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(2))
    assert heads.why == "embedding (embedding_1) looks it up in a table"


def test_biases_shrink_with_the_rows_and_nothing_of_the_norms_does():
    groups, _ = find_groups(capture(bert().eval(), example_of(bert())))
    first = groups[1]
    assert {(c.holder, c.axis) for c in first.stored} == {
        ("encoder.layer.0.intermediate.dense.weight", 0),
        ("encoder.layer.0.intermediate.dense.bias", 0),
        ("encoder.layer.0.output.dense.weight", 1),
    }
    assert not any("LayerNorm" in c.holder for g in groups for c in g.stored)


class Between(nn.Module):
    """linear (6 -> 8), whatever `between` does, linear (8 -> 6)."""

    def __init__(self, between, read=8):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(6, 8), nn.Linear(read, 6), between
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.down(self.between(self, self.up(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda _, h: F.gelu(h),
        lambda _, h: F.silu(h) * h + 2 * h.tanh().clamp(min=0) ** 2,
        lambda m, h: h * m.scale,
        lambda _, h: torch.where(h > 0, h, 0.1 * h),
        lambda _, h: h.relu_(),
        lambda _, h: h.unsqueeze(1).flatten(1),
        lambda _, h: h.T.contiguous().T,
        lambda _, h: h[:, :],
        lambda _, h: h - h.detach() * h.mean(0),
        lambda _, h: h * F.softmax(h, dim=0).sum(0, keepdim=True),
    ],
    ids=["gelu", "gated", "scale", "where", "in place", "views", "transposes", "slice", "batch mean", "batch softmax"],
)
def test_ops_that_keep_units_apart_leave_a_group(between):
    groups, refused = small(Between(between))
    assert groups == {"down": (8, 1, ("up",))}
    assert refused == []


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda _, h: h.softmax(-1), "softmax (softmax) reads all of it at once"),
        (lambda _, h: F.layer_norm(h, (8,)) + h, "layer_norm (layer_norm) reads all of it at once"),
        (lambda _, h: h / h.sum(1, keepdim=True), "sum (sum_1) reads all of it at once"),
        (lambda _, h: h + h.cumsum(1), "cumsum (cumsum) may mix it"),
        (lambda _, h: h + h[:, :1], "slice (slice_2) takes a part of it"),
        (lambda _, h: h + h.select(1, 2).unsqueeze(1), "select (select) takes single entries of it"),
        (lambda _, h: h + torch.cat([h[:, 1:], h[:, :1]], 1), "slice (slice_2) takes a part of it"),
        (lambda _, h: h + h @ (h.T @ h), "matmul (matmul_1) sums over it"),
        (lambda _, h: (h.view(-1, 2, 4) + h.view(-1, 4, 2).mT).reshape(-1, 8), "two factors of one dimension are tied"),
        (lambda _, h: h + h.reshape(-1).view(-1, 8), "reshape (reshape) merges it with a dynamic size"),
    ],
    ids=["softmax", "norm", "sum", "unknown", "slice", "select", "cat", "matmul", "views", "flat"],
)
def test_ops_that_mix_units_are_named_in_the_refusal(between, why):
    groups, refused = small(Between(between))
    assert groups == {}
    assert [(r.producers, r.consumers) for r in refused][:1] == [(("up",), ("down",))]
    assert refused[0].why.startswith(why)


def test_inputs_and_outputs_are_never_cut():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.a(x)
            return x + self.b(x)

    groups, refused = small(Stream())
    assert groups == {}
    assert [r.why for r in refused] == ["it is an input of the model"]

    class Shown(Between):
        def forward(self, x):
            h = self.up(x)
            return self.down(h), h

    groups, refused = small(Shown(None))
    assert groups == {}
    assert [r.why for r in refused] == ["it is an output of the model"]


def test_every_maker_and_every_reader_belongs_to_the_group():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
            self.c, self.d = nn.Linear(8, 6), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x) + self.b(x).relu()
            return self.c(h), self.d(h.tanh())

    found, _ = find_groups(capture(Wide(), (torch.randn(4, 6),)))
    assert [(g.producers, g.consumers, g.units) for g in found] == [(("a", "b"), ("c", "d"), 8)]


def test_a_chain_of_linears_has_a_group_between_each_two():
    chain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    groups, _ = small(chain)
    assert groups == {"2": (8, 1, ("0",)), "4": (10, 1, ("2",))}


def test_a_layer_used_twice_is_one_group():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

        def forward(self, x):
            for _ in range(2):
                x = x + self.down(self.up(self.norm(x)).relu())
            return x

    groups, _ = small(Shared())
    assert groups == {"down": (8, 1, ("up",))}


class Fused(nn.Module):
    """Attention from one linear for q, k and v, taken apart as `parts` does: x (b, s, 3 * 12) -> 3 of (b, 3, s, 4)."""

    def __init__(self, parts):
        super().__init__()
        self.qkv, self.out, self.parts = nn.Linear(6, 36), nn.Linear(12, 6), parts

    def forward(self, x):
        q, k, v = self.parts(self.qkv(x))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12))


def heads(x):
    return x.view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2)


PARTS = {
    "chunk": lambda h: [heads(p) for p in h.chunk(3, -1)],
    "split": lambda h: [heads(p) for p in h.split(12, -1)],
    "sizes": lambda h: [heads(p) for p in h.split([12, 12, 12], -1)],
    "unbind": lambda h: h.view(h.shape[0], h.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0),
    "index": lambda h: [h.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)[i] for i in range(3)],
    "inside": lambda h: h.view(h.shape[0], h.shape[1], 3, 12).transpose(1, 2).chunk(3, -1),
}


@pytest.mark.parametrize("parts", PARTS)
def test_a_fused_projection_is_cut_in_all_its_parts(parts):
    found, refused = find_groups(capture(Fused(PARTS[parts]), (torch.randn(2, 5, 6),)))
    assert [(g.producers, g.consumers, g.units, g.width) for g in found] == [(("qkv",), ("out",), 3, 4)]
    rows = next(c.span for c in found[0].stored if (c.holder, c.axis) == ("qkv.weight", 0))
    assert rows == (Span(1, 3, 12) if parts == "inside" else Span(3, 3, 4))
    assert refused == []


def test_unequal_parts_are_refused():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.other = nn.Linear(6, 12), nn.Linear(8, 6), nn.Linear(4, 6)

        def forward(self, x):
            a, b = self.up(x).split([8, 4], -1)
            return self.down(a) + self.other(b)

    assert small(Uneven())[0] == {}


@pytest.mark.parametrize("span", [Span(1, 5, 1), Span(1, 3, 4), Span(3, 4, 2)])
def test_positions_are_those_of_a_reshape(span):
    whole = torch.randn(span.size)
    kept = torch.tensor([0, span.units - 1])
    expected = whole.view(span.outer, span.units, span.width)[:, kept].reshape(-1)
    assert torch.equal(whole[span.positions(kept)], expected)
    for unit, positions in enumerate(span.by_unit()):
        assert torch.equal(positions, span.positions(torch.tensor([unit])))


def test_strides_travel_along_every_tie_and_nest():
    a, b, c, d = (Dim(name, 0) for name in "abcd")
    ties = Ties({a: 24, b: 24, c: 4, d: 6}, [((a,), (b,)), ((b,), (c, d))], {})
    strides, unlike = factorise(ties)
    assert strides == {a: {1, 6}, b: {1, 6}, c: {1}, d: {1}}
    assert unlike == set()
    graph = dependency_graph(ties)
    assert {(v.dim.holder, v.stride): data["length"] for v, data in graph.nodes(data=True)} == {
        ("a", 1): 6, ("a", 6): 4, ("b", 1): 6, ("b", 6): 4, ("c", 1): 4, ("d", 1): 6
    }  # fmt: skip
    assert {frozenset((u.dim.holder + str(u.stride), v.dim.holder + str(v.stride))) for u, v in graph.edges} == {
        frozenset(pair) for pair in [("a1", "b1"), ("a6", "b6"), ("b6", "c1"), ("b1", "d1")]
    }


def test_views_that_do_not_nest_refuse_everything_they_touch():
    a, b, c, d, e = (Dim(name, 0) for name in "abcde")
    ties = Ties({a: 24, b: 4, c: 6, d: 6, e: 4}, [((a,), (b, c)), ((a,), (d, e))], {})
    # 24 as 4 x 6 has stride 6, as 6 x 4 stride 4: neither divides the other
    assert factorise(ties)[1] & {a}
    whys = {v.dim: data["why"] for v, data in dependency_graph(ties).nodes(data=True)}
    assert set(whys) == {a, b, c, d, e}
    assert set(whys.values()) == {"its views cut it in ways that do not nest"}
