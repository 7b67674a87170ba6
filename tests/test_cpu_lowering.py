"""Lowering to a CPU: kernels against their meaning within derived tolerances, sizes, what stays untouched, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress
from benchmarks.models import minilm
from fxcompress.codegen.cpu import pointwise, products, rules
from fxcompress.codegen.cpu.decode import dense
from fxcompress.codegen.cpu.lower import lower_graph
from fxcompress.core.errors import CheckpointError, LoweringError
from tests.fusing import Net, rewritten

WIDE = 192  # 192 * 192 elements are enough to be lowered
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 products need VNNI")
bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bf16 products need AVX-512 BF16")


@pytest.fixture(autouse=True)
def _without_profile(monkeypatch):
    """The static rule, whatever was measured on this machine."""
    monkeypatch.setattr(fxcompress.lowering, "cached", lambda: None)


class Block(nn.Module):
    """Attention and a feed-forward layer of width WIDE, 4 heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(WIDE, WIDE) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(WIDE), nn.Linear(WIDE, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.o(mixed))
        return self.head(x + self.down(F.gelu(self.up(x))))


def block(spec="quantize{bits=8, group_size=0}"):
    torch.manual_seed(0)
    specs = {"head": "keep", "*": spec}
    return fxcompress.restructure(Block().eval(), specs, example_inputs=(torch.randn(3, 5, WIDE),))


def relative(y, reference):
    return float((y - reference).norm() / reference.norm())


def called(lowered):
    graph = getattr(lowered, "graph_module", lowered).graph
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


def test_rounded_tokens_are_within_half_a_step():
    x = torch.cat([torch.randn(64, 96) * torch.logspace(-20, 20, 64)[:, None], F.gelu(torch.randn(64, 96))])
    q, step, offset = products.rounded_tokens(x)
    assert q.dtype == torch.int8
    assert (q.amin(1) == -128).all()
    assert (q.amax(1) == 127).all()
    # three roundings of numbers up to 255 steps
    assert ((step * q + offset - x).abs() <= step * (0.5 + 255 * 4 * 2**-24)).all()


def test_constant_and_empty_rows_are_kept():
    for x in (torch.full((2, 8), 3.5), torch.zeros(2, 8), torch.empty(0, 8)):
        q, step, offset = products.rounded_tokens(x)
        torch.testing.assert_close(step * q + offset, x)


@vnni
@pytest.mark.parametrize("tokens", [0, 1, 3, 130])
def test_int8_linear_computes_its_formula(tokens):
    torch.manual_seed(0)
    x, weights, bias = torch.randn(tokens, 2, 96), [torch.randn(40, 96), torch.randn(24, 96)], torch.randn(40)
    packed = [products.rounded_rows(w) for w in weights]
    codes = torch.cat([c for c, _, _ in packed])
    made = products.int8_linear(x, codes, [s for _, s, _ in packed], [r for _, _, r in packed], [bias, None])
    q, step, offset = products.rounded_tokens(x.reshape(-1, 96))
    for y, (c, s, _), b in zip(made, packed, (bias, None)):
        exact = (step.double() * q + offset.double()) @ (c.double() * s.double()[:, None]).T
        exact = exact + (0 if b is None else b)
        # t acc and o r are up to 128 sum|C| t, and each of four roundings loses 2^-24 of it
        slack = 8 * 2**-24 * (step.double() * 256 + offset.double().abs()) * (c.double().abs().sum(1) * s) + 1e-6
        assert y.shape == (tokens, 2, len(s))
        assert ((y.reshape(-1, len(s)).double() - exact).abs() <= slack).all()


@vnni
def test_int8_dynamic_has_the_integers_of_its_op():
    torch.manual_seed(0)
    x, codes = torch.randn(3, 7, 96), torch.randint(-127, 128, (40, 96), dtype=torch.int8)
    scales, divisors, bias = torch.rand(40) + 0.1, torch.rand(96) + 0.5, torch.randn(40)
    meant = torch.ops.fxcompress.int8_dynamic_linear(x, codes, scales, divisors, bias)
    torch.testing.assert_close(products.int8_dynamic(x, codes, scales, divisors, bias), meant, rtol=2**-22, atol=1e-5)


@bf16
def test_bf16_linear_loses_what_three_roundings_lose():
    torch.manual_seed(0)
    x, w, b = torch.randn(9, 96), torch.randn(40, 96), torch.randn(40)
    y = products.bf16_linear(x, w.bfloat16(), b)
    exact = F.linear(x.double(), w.double(), b.double())
    bound = 2**-8 * F.linear(x.abs(), w.abs()) + 2**-8 * (exact - b).abs()  # x and w: 2^-9 each; y: 2^-9
    assert ((y - exact).abs() <= bound + 1e-5).all()


def test_gelu_is_within_its_bound_everywhere():
    x = torch.linspace(-30, 30, 600_001)
    assert float((pointwise.gelu(x) - F.gelu(x.double())).abs().max()) <= 3e-5
    assert torch.equal(pointwise.gelu(torch.tensor([100.0, -100.0, 0.0])), torch.tensor([100.0, -0.0, 0.0]))


@bf16
@pytest.mark.parametrize("kind", ["none", "bool", "float", "no key"])
def test_attention_is_that_of_pytorch_within_bf16(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    mask = {"none": None, "bool": torch.rand(2, 1, 7, 7) > 0.3, "float": torch.randn(2, 1, 7, 7)}.get(kind)
    if kind == "no key":
        mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
        mask[0, 0, 2] = False
    elif kind == "bool":
        mask[..., 0] = True
    exact = F.scaled_dot_product_attention(q, k, v, mask)
    added = pointwise.additive(mask) if mask is not None and mask.dtype == torch.bool else mask
    # a score is up to 4, so it moves by 4 * 3 * 2^-9 at most; shares, values and output by 2^-9 each
    torch.testing.assert_close(
        pointwise.attention(q, k, v, added, None), exact, rtol=0, atol=float(v.abs().max()) * 15 * 2**-9
    )


def test_tables_are_gathered_within_half_a_step():
    torch.manual_seed(0)
    for columns in (128, 40):
        table = torch.randn(50, columns)
        codes, scales = products.packed_table(table)
        ids = torch.randint(0, 50, (2, 3))
        found = products.gather(ids, codes, scales, torch.float32)
        steps = scales.expand(codes.shape).flatten(1)[ids]
        assert ((found - table[ids]).abs() <= steps * 0.501).all()
        with pytest.raises(IndexError):
            products.gather(torch.tensor([50]), codes, scales, torch.float32)


@pytest.mark.parametrize(
    "spec",
    [
        "quantize{bits=8, group_size=0}",
        "quantize{bits=4, group_size=32}",
        "float8",
        "low_rank{rank=90} | quantize{bits=8, group_size=0}",
        "low_rank{rank=90}",
        "monarch{blocks=4, rank=4}",
        "monarch{blocks=4, rank=40} | quantize{bits=8, group_size=0}",
        "block_low_rank{blocks=4, rank=4}",
        "tensor_train{rank=8}",
        "quaternion",
        "prune{sparsity=0.5}",
        "prune_2_4 | quantize{bits=8, group_size=0}",
    ],
)
def test_every_structure_is_lowered(spec):
    small = block(spec)
    fast = fxcompress.lower(small, to="eager")
    x = torch.randn(2, 9, WIDE)
    with torch.no_grad():
        meant = small(x)
    # int8 on both sides and bf16 attention: 1 % of each product, six of them one behind the other
    assert relative(fast(x), meant) < 0.04
    if torch.cpu._is_vnni_supported() and "rank=4}" not in spec:
        assert "int8_linear" in called(fast)
        assert not [name for name in called(fast) if "fxcompress" in name]


@vnni
def test_low_rank_is_two_products_and_parallel_ones_are_one():
    assert called(fxcompress.lower(block("low_rank{rank=90}"), to="eager")).count("int8_linear") == 12
    # Q, K and V: one
    assert called(fxcompress.lower(block(), to="eager")).count("int8_linear") == 4


def test_small_products_stay_as_they_are():
    gm = rewritten(Net(lambda self, x: self.d(F.relu(self.a(x)))), (torch.randn(3, 5, 48),))
    x = torch.randn(2, 4, 48)
    with torch.no_grad():
        torch.testing.assert_close(lower_graph(gm)(x), gm(x))


@bf16
def test_kept_weights_go_to_bf16():
    small = fxcompress.restructure(
        Block().eval(), {"up": "quantize{bits=8, group_size=0}", "*": "keep"}, example_inputs=(torch.randn(3, 5, WIDE),)
    )
    assert called(fxcompress.lower(small, to="eager")).count("bf16_linear") == 5


def test_decoding_asks_the_op():
    torch.manual_seed(0)
    v, u, bias = torch.randn(5, 16), torch.randn(12, 5), torch.randn(12)
    found = dense("low_rank_linear", {"v": v, "u": u, "bias": bias}, 16, torch.float32)
    torch.testing.assert_close(found, u @ v)


def test_the_rule_is_told_by_size_dtype_and_processor():
    assert rules.kernel_of(100, torch.float32, True) == "float"
    assert rules.kernel_of(1 << 20, torch.float64, True) == "float"
    assert rules.stays_structured(100, 100, 100)
    assert not rules.stays_structured(5000, 100, 100)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inductor_serves_all_sizes(context):
    small = block()
    fast, slow = fxcompress.lower(small, to="inductor"), fxcompress.lower(small, to="eager")
    with context():
        for shape in ((3, 5), (1, 5), (3, 1), (1, 1), (6, 33)):
            x = torch.randn(*shape, WIDE)
            assert relative(fast(x), slow(x)) < 0.01  # other roundings of the same formula
            assert not fast(x).requires_grad


def test_nothing_else_is_touched():
    small = block()
    x = torch.randn(2, 9, WIDE)
    before, state, text = small(x), {n: t.clone() for n, t in small.state_dict().items()}, fxcompress.show(small)
    config = torch._inductor.config.get_config_copy()
    threads, dtype, rng = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    fxcompress.lower(small, to="inductor")(x)
    assert torch._inductor.config.get_config_copy() == config
    assert (threads, dtype, torch.is_grad_enabled()) == (torch.get_num_threads(), torch.get_default_dtype(), True)
    assert torch.equal(rng, torch.get_rng_state())
    assert fxcompress.show(small) == text
    assert all(torch.equal(t, state[n]) for n, t in small.state_dict().items())
    assert torch.equal(small(x), before)


@vnni
def test_packed_weights_replace_the_decoded_ones():
    fast = fxcompress.lower(block(), to="eager")
    held = {t.data_ptr(): t.numel() * t.element_size() for t in fast.state_dict().values()}
    assert sum(held.values()) < 1.1 * 6 * WIDE * WIDE + 4 * 5 * 6 * WIDE


def test_a_lowered_module_is_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Dropout(0.5))
    specs = {"0": "quantize{bits=8, group_size=0}"}
    small = fxcompress.restructure(model, specs, example_inputs=(torch.randn(3, WIDE),))
    x, fast = torch.randn(4, WIDE), fxcompress.lower(small.train(), to="eager")
    assert small.training
    assert torch.equal(fast.train()(x), fast(x))


def test_compile_lowers_what_it_made():
    torch.manual_seed(0)
    x = torch.randn(4, 5, WIDE)
    fast = fxcompress.compile(Block().eval(), "3x", example_inputs=(x,), progress=False, lower="eager")
    assert fast.plan.predicted_bytes <= fast.report.original_bytes / 2.9
    assert fast(x).shape == (4, 5, 3)


def test_errors_say_what_to_do(tmp_path):
    small = block()
    fast = fxcompress.lower(small, to="eager")
    with pytest.raises(LoweringError, match=r'cannot lower to \'fast\': it is "eager" or "inductor"\.'):
        fxcompress.lower(small, to="fast")
    with pytest.raises(LoweringError, match=r'cannot lower to \'fast\': it is "eager" or "inductor"\.'):
        fxcompress.compile(Block(), "3x", example_inputs=(torch.randn(2, 3, WIDE),), lower="fast")
    with pytest.raises(LoweringError, match="this module is lowered already"):
        fxcompress.lower(fast)
    with pytest.raises(LoweringError, match="not a Linear"):
        fxcompress.lower(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="save the compiled one, and lower it after loading"):
        fxcompress.save(fast, tmp_path / "m")
    elsewhere = small.copy().to("meta")
    with pytest.raises(LoweringError, match=r"the module is on meta, .* move it with \.cpu\(\) first"):
        fxcompress.lower(elsewhere)
    with pytest.raises(fxcompress.core.errors.InputError):
        fast(torch.randn(2, 3, WIDE + 1))


@vnni
@pytest.mark.slow
def test_minilm_keeps_its_embeddings(data):
    model = data(minilm.model)
    inputs = data(minilm.batches, ["a dog runs in the park", "stocks fell sharply on Monday after new tariffs"] * 4, 8)
    small = fxcompress.restructure(model, {"*": "quantize{bits=8, group_size=0}"}, example_inputs=inputs[0])
    fast = fxcompress.lower(small, to="inductor")
    texts = ["A man is playing a guitar.", "Nobody knows why the river rose so early this year.", "Prices fell."] * 8
    e, e0 = minilm.embed(fast, texts), minilm.embed(model, texts)
    assert minilm.mean_cosine(e, e0) >= 0.995
