"""Costs of whole graphs: flops as FlopCounterMode counts them, bytes as they are stored, what is free, what is not."""

import pytest
import sympy
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.codegen.costs import cost_of, price
from fxcompress.codegen.ops import (
    block_low_rank_linear,
    int8_dynamic_linear,
    linformer_attention,
    low_rank_linear,
    monarch_linear,
    quaternion_linear,
    tensor_train_linear,
)
from fxcompress.core.capture import capture
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish, stored_bytes
from fxcompress.cost_model.aten_costs import PRODUCTS
from fxcompress.cost_model.calls import Call, array_of, named
from fxcompress.passes import REWRITES, recipe
from fxcompress.passes.fuse import fuse
from tests.costing import MODELS, captured, ids, sizes_of
from tests.fusing import QUANTIZED, D, H, Net, rewritten
from tests.test_fuse_models import IDS, gpt2, llama


def counted(call, *args, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call(*args, **kwargs)  # the fused attention of a CPU is not counted
    return counter.get_total_flops()


def of_ops(cost, *names):
    """The cost of each call of some ops, in order."""
    return [of.cost for of in cost.nodes if of.op.split(".")[1] in names]


def graph(body, *shape):
    class Model(nn.Module):
        def forward(self, x):
            return body(x)

    return capture(Model(), (torch.ones(shape or (2, 6, 8)),))


@pytest.mark.parametrize("size", [(8, 32), (3, 17)])
@pytest.mark.parametrize("name", MODELS)
def test_products_of_dense_models_are_counted_as_flop_counter_mode_does(name, size):
    gm, inputs = captured(name), MODELS[name][1](*size)
    cost = cost_of(gm).at(**sizes_of(gm, inputs))
    assert sum(c.flops for c in of_ops(cost, *PRODUCTS)) == counted(gm, *inputs.values())
    assert cost.warnings == ()


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: torch.bmm(x, x.transpose(1, 2)), (3, 5, 7)),
        (lambda x: x @ x[0].T, (3, 5, 7)),
        (lambda x: torch.baddbmm(x, x, x), (3, 5, 5)),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), (3, 5, 7)),
        (lambda x: nn.functional.conv1d(x, torch.ones(4, 6, 3)), (3, 6, 9)),
        (lambda x: nn.functional.conv_transpose2d(x, torch.ones(6, 4, 3, 3), stride=2), (3, 6, 9, 9)),
    ],
)
def test_each_kind_of_product_is_counted_so(body, shape):
    cost = cost_of(gm := graph(body, *shape))
    flops = sum(c.flops for c in of_ops(cost.at(**sizes_of(gm, {"x": torch.ones(shape)})), *PRODUCTS))
    assert flops == counted(body, torch.ones(shape)) > 0


T = torch.ones
OWN = [
    (low_rank_linear.low_rank_linear, (T(2, 5, 12), T(3, 12), T(8, 3), T(8))),
    (block_low_rank_linear.block_low_rank_linear, (T(2, 5, 12), T(6, 12), T(8, 6), 2, None)),
    (monarch_linear.monarch_linear, (T(2, 5, 12), T(6, 12), T(8, 6), 2, T(8))),
    (quaternion_linear.quaternion_linear, (T(2, 5, 12), T(2, 12))),
    (int8_dynamic_linear.int8_dynamic_linear, (T(2, 5, 12), T(8, 12).to(torch.int8), T(8), T(12))),
    (tensor_train_linear.tensor_train_linear, (T(1, 2, 12), [T(3, 8), T(8, 2)], [3, 4], [4, 2], 8, None)),
    (tensor_train_linear.tensor_train_linear, (T(50, 9, 12), [T(3, 8), T(8, 2)], [3, 4], [4, 2], 8, None)),
    (linformer_attention.linformer_attention, (T(2, 4, 9, 6), T(2, 4, 9, 6), T(2, 4, 9, 6), T(5, 9), T(5, 9))),
]


@pytest.mark.parametrize(("op", "args"), OWN)
def test_ops_of_fxcompress_are_counted_as_their_bodies_are(op, args):
    overload, out = op._opoverload, op(*args)

    def arrays(value, name):
        if isinstance(value, list):
            return [arrays(v, f"{name}{i}") for i, v in enumerate(value)]
        return array_of(name, value) if isinstance(value, torch.Tensor) else value

    told = [arrays(value, str(i)) for i, value in enumerate(args)]
    call = Call(overload, named(overload, tuple(told), {}), (array_of("out", out),))
    assert price(call).flops == counted(op._init_fn, *args)


SPECS = ["keep", QUANTIZED, "low_rank{rank=4}", "monarch{blocks=4, rank=1}", "int8_dynamic", "quaternion",
         "block_low_rank{blocks=2, rank=4} | float8", "tensor_train{rank=8}", "prune_2_4"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_products_cost_what_the_plan_says_fused_or_not_and_weigh_what_is_stored(spec):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 80), nn.Tanh()), torch.randn(3, 5, 48)
    gm = capture(model, (x,))
    (site,) = find_sites(gm)
    made = recipe.parse(spec, REWRITES)
    planned = made.at(site).cost(site).at(**sizes_of(gm, {"x": x})).flops
    if spec != "keep":
        made.make(site).apply(gm, site)
    finish(gm)
    whole, together = cost_of(gm), cost_of(fuse(gm))
    at = whole.at(**sizes_of(gm, {"x": x}))
    assert sum(c.flops for c in of_ops(at, *("linear", spec.split("{")[0] + "_linear"))) == planned
    assert sympy.expand(whole.total.flops - together.total.flops) == 0
    for cost in (whole, together):
        assert sum(of.cost.weight_bytes for of in cost.nodes) == cost.total.weight_bytes == stored_bytes(gm)
    if spec != "keep":
        fused, apart = (c.at(**sizes_of(gm, {"x": x})).total for c in (together, whole))
        assert fused.launches < apart.launches
        assert fused.bytes < apart.bytes


@pytest.mark.parametrize("make", [llama, gpt2])
def test_whole_models_weigh_what_is_stored(make):
    gm = rewritten(make(), ids(*IDS.shape))
    for cost in (cost_of(gm), cost_of(fuse(gm))):
        assert cost.total.weight_bytes == stored_bytes(gm)
        assert cost.warnings == ()


def test_a_tied_weight_is_read_twice_and_weighs_once():
    cost = cost_of(captured("gpt2"))
    readers = [of for of in cost.nodes if any(t.bytes == 64 * 64 * 4 for t in of.stored)]
    assert [of.op.split(".")[1] for of in readers if len(of.stored) == 1][:1] == ["embedding"]
    tied = set.intersection(*(set(cost.nodes[i].stored) for i in (0, -1)))
    assert sum(t.bytes for t in tied) == 64 * 64 * 4
    assert sum(of.cost.weight_bytes for of in cost.nodes) == cost.total.weight_bytes + 64 * 64 * 4


def test_only_what_copies_costs():
    views = cost_of(graph(lambda x: x.transpose(1, 2).unsqueeze(0).flatten(0, 1)[:, 1:].contiguous().to(x.dtype)))
    assert [of.op for of in views.nodes] == ["aten.contiguous"]
    kept = cost_of(graph(lambda x: nn.functional.dropout(x.reshape(-1, 8), training=False).contiguous().split(4, 1)))
    assert (kept.nodes, kept.peak.bytes) == ((), 0)


def test_an_expanded_tensor_is_read_once():
    (add,) = cost_of(graph(lambda x: x[:, :1].expand(-1, 100, -1) + 1.0)).nodes
    (batch,) = add.cost.bytes.free_symbols
    assert add.cost == add.cost.__class__(800 * batch, (8 + 800) * 4 * batch, 0, 1)


def test_a_lookup_reads_the_rows_it_returns():
    (lookup,) = cost_of(capture(nn.Embedding(1000, 16).eval(), (IDS,))).nodes
    tokens = sympy.Mul(*lookup.cost.bytes.free_symbols)
    assert (lookup.cost.bytes, lookup.cost.weight_bytes) == (tokens * (8 + 2 * 64), 64_000)


def test_an_unknown_op_costs_its_traffic_and_is_named():
    cost = cost_of(graph(torch.special.i0))
    assert cost.warnings == ("aten.special_i0: its traffic is counted, its flops are not known",)
    assert (cost.total.flops, cost.total.launches) == (0, 1)
    assert cost.at(**dict.fromkeys(cost.symbols, 3)).total.bytes == 2 * 3 * 3 * 8 * 4
    assert "warning: aten.special_i0" in str(cost)


def test_detaching_in_place_is_free():
    assert cost_of(graph(lambda x: (x + 1).detach_())).total.launches == 1


def test_a_fused_node_is_as_many_kernels_as_it_has_products():
    torch.manual_seed(0)
    x = torch.randn(3, 5, D)
    gm = rewritten(Net(lambda n, x: n.d(nn.functional.silu(n.a(x)) * n.b(x)) + x), (x,))
    gated, down = cost_of(fuse(gm)).at(**sizes_of(gm, {"x": x})).nodes
    assert (gated.cost.launches, down.cost.launches) == (2, 1)
    # x twice; silu(a x) written, read, and what becomes of it written
    assert gated.cost.bytes == 15 * (2 * D + 3 * H) * 4 + gated.cost.weight_bytes
    assert down.cost.bytes == 15 * (H + 2 * D) * 4 + down.cost.weight_bytes
    # while the second kernel of the first node runs: silu(a x) and the result
    assert cost_of(fuse(gm)).peak.at(**sizes_of(gm, {"x": x})).moments == ((gated.node, 15 * 2 * H * 4),)


@pytest.mark.parametrize("spec", [QUANTIZED, "low_rank{rank=4}", "prune_2_4"])
@pytest.mark.parametrize(("layer", "x"), [(nn.Conv2d(8, 16, 3), T(2, 8, 9, 9)), (nn.Embedding(512, 64), IDS)])
def test_calls_that_a_rewrite_inserted_are_priced_like_any_other(layer, x, spec):
    gm = rewritten(layer, (x,), spec)
    cost = cost_of(gm)
    assert cost.warnings == ()
    assert cost.total.weight_bytes == stored_bytes(gm)
    if spec.startswith("low_rank") and x.dim() == 4:
        flops = cost.at(**sizes_of(gm, {"x": x})).total.flops
        assert flops == counted(gm, x)


def test_calls_whose_results_nobody_knows_are_named():
    untold = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert cost_of(untold).warnings == ("0: nobody knows what it makes, or counts it",)


def test_two_numbers_of_one_formula():
    gm = captured("llama")
    cost = cost_of(gm)
    assert cost.symbols == sorted(sizes_of(gm, ids(8, 32)))
    at = cost.at(**sizes_of(gm, ids(8, 32)))
    assert at.symbols == []
    assert at.total.flops == sum(of.cost.flops for of in at.nodes) == cost.total.at(**sizes_of(gm, ids(8, 32))).flops


def test_the_table_of_a_fused_llama(golden):
    cost = cost_of(fuse(rewritten(llama(), {"input_ids": IDS})))
    sizes = dict.fromkeys(cost.symbols, 8)
    golden(f"{cost}\n\n{cost.at(**sizes)}")
