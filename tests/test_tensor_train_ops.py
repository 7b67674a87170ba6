"""The ops of tensor trains: both ways to multiply, their flops, gradients and what they keep, lookups."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.tensor_train_memory as memory
import fxcompress.codegen.ops.tensor_train_embedding as embedding_op
import fxcompress.codegen.ops.tensor_train_linear as linear_op
from fxcompress.codegen.ops import tensor_train as math_of
from fxcompress.passes.tt_shapes import bond_ranks
from tests.trains import PAPER, SHAPES, UNEVEN, dense_of, train_of

LINEAR, EMBEDDING = torch.ops.fxcompress.tensor_train_linear, torch.ops.fxcompress.tensor_train_embedding


@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((5, 1), (2, 3)), ((4, 4),) * 4])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_both_ways_agree_with_the_formula(shapes, rank):
    cores, n, m, ranks = train_of(shapes, rank, torch.float32)
    want = dense_of(cores, shapes, ranks)
    x = torch.randn(7, math.prod(n), generator=torch.Generator().manual_seed(1))
    # A sum of products of d + 1 numbers, each product and partial sum off by 2^-24: d R n of them a core at most, times
    # the same sum of absolute values.
    roundings = sum(r * size for r, size in zip(ranks, n)) + sum(ranks) + len(n)
    size = dense_of([c.abs() for c in cores], shapes, ranks)
    eps = 2**-24
    assert bool(((math_of.rebuild(cores, n, m) - want).abs() <= roundings * eps * size).all())
    room = (roundings + math.prod(n)) * eps * (x.abs().double() @ size.T)
    assert bool(((math_of.contract(x, cores, n, m) - x.double() @ want.T).abs() <= room).all())
    turned = math_of.turned(cores, n, m)
    assert torch.equal(dense_of(turned, [(b, a) for a, b in shapes], ranks), want.T)


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize(("shapes", "rank"), [(SHAPES, 5), (UNEVEN, 3), (PAPER[0][3], 16), (((3, 5), (4, 2)), 6)])
def test_flops_are_those_counted_and_the_cheaper_way_is_taken(shapes, rank, tokens):
    cores, n, m, ranks = train_of(shapes, rank, torch.float32)
    x = torch.zeros(tokens, math.prod(n))
    with FlopCounterMode(display=False) as contract:
        math_of.contract(x, cores, n, m)
    with FlopCounterMode(display=False) as rebuild:
        x @ math_of.rebuild(cores, n, m).t()
    dense = 2 * tokens * math.prod(n) * math.prod(m)
    assert contract.get_total_flops() == tokens * math_of.contract_flops(n, m, ranks)
    assert rebuild.get_total_flops() == math_of.rebuild_flops(n, m, ranks) + dense
    cheaper = contract.get_total_flops() <= rebuild.get_total_flops()
    assert math_of.contracts(tokens, n, m, ranks) == cheaper
    with FlopCounterMode(display=False) as taken:
        linear_op.tensor_train_linear._init_fn(x, cores, n, m, math.prod(m), None)
    assert taken.get_total_flops() == min(contract.get_total_flops(), rebuild.get_total_flops())


def test_the_break_even_of_the_papers_layer():
    n, m = zip(*PAPER[0][3])
    ranks = bond_ranks(PAPER[0][3], 16)
    assert math_of.contract_flops(n, m, ranks) == 2 * 2_555_904  # 2.56 M multiplications a token, dense 2.36 M
    assert math_of.contracts(198, n, m, ranks)
    assert not math_of.contracts(199, n, m, ranks)


def test_the_split_is_the_best_of_all():
    for shapes, rank in [(SHAPES, 4), (UNEVEN, 5), (PAPER[0][3], 16), (PAPER[1][3], 64)]:
        cores, n, m, ranks = train_of(shapes, rank, torch.float32)
        counted = math_of.rebuild_flops(n, m, ranks)
        by_hand = []
        for split in range(1, len(n)):
            left, right, flops = cores[0].reshape(-1, ranks[1]), cores[-1].reshape(ranks[-2], -1), 0
            for k in range(1, split):
                flops += 2 * len(left) * cores[k].numel()
                left = torch.empty(len(left) * n[k] * m[k], ranks[k + 1])
            for k in range(len(n) - 2, split - 1, -1):
                flops += 2 * cores[k].numel() * right.shape[1]
                right = torch.empty(ranks[k], n[k] * m[k] * right.shape[1])
            by_hand.append(flops + 2 * left.numel() * right.shape[1])
        assert counted == min(by_hand)


def linear_sample(tokens=(2, 5), bias=True, rows=24, grad=False, dtype=torch.float32, shapes=SHAPES, rank=3):
    cores, n, m, _ = train_of(shapes, rank, dtype)
    x = torch.randn(*tokens, math.prod(n), generator=torch.Generator().manual_seed(2), dtype=dtype)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(3), dtype=dtype) if bias else None
    floats = [x, *cores, *([b] if bias else [])]
    for t in floats:
        t.requires_grad_(grad)
    return x, cores, n, m, rows, b


def embedding_sample(ids=((0, 21, 3), (3, 3, 7)), rows=24, grad=False, dtype=torch.float32, shapes=UNEVEN, rank=3):
    cores, n, m, _ = train_of(shapes, rank, dtype)
    for core in cores:
        core.requires_grad_(grad)
    return torch.tensor(ids), cores, n, m, rows


LINEAR_SAMPLES = [
    lambda **k: linear_sample(**k),
    lambda **k: linear_sample(bias=False, **k),
    lambda **k: linear_sample(tokens=(), **k),
    lambda **k: linear_sample(tokens=(0, 3), **k),
    lambda **k: linear_sample(tokens=(300,), rows=22, **k),
    lambda **k: linear_sample(tokens=(2,), rows=21, shapes=UNEVEN, **k),
    lambda **k: linear_sample(tokens=(200,), rows=5, shapes=((2, 3), (3, 2)), rank=2, **k),
    lambda **k: linear_sample(bias=False, rows=6, shapes=((2, 3), (3, 2)), rank=1, **k),
]
EMBEDDING_SAMPLES = [
    lambda **k: embedding_sample(**k),
    lambda **k: embedding_sample(5, **k),
    lambda **k: embedding_sample(rows=22, **k),
    lambda **k: embedding_sample((0, 4), rows=5, shapes=((2, 3), (3, 2)), rank=2, **k),
]


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_torch_accepts_the_ops(make):
    args = make()
    op = LINEAR if len(args) == 6 else EMBEDDING
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("make", [LINEAR_SAMPLES[6], LINEAR_SAMPLES[7], EMBEDDING_SAMPLES[3]])
def test_torch_accepts_the_ops_with_gradients(make):  # two cores: each is traced and compiled, for seconds
    args = make(grad=True)
    op = LINEAR if len(args) == 6 else EMBEDDING
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_the_fake_answer_has_the_shape_dtype_and_strides_of_the_real_one(make):
    args = make()
    op = LINEAR if len(args) == 6 else EMBEDDING
    real = op(*args)
    fake = op(*torch.utils._pytree.tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("make", LINEAR_SAMPLES)
def test_gradients_of_the_linear_op(make):
    x, cores, n, m, rows, bias = make(grad=True, dtype=torch.float64)
    tokens = x.numel() // x.shape[-1]
    if tokens > 20:
        x = x.detach()[:3].requires_grad_()

    def run(x, bias, *cores):
        return LINEAR(x, list(cores), n, m, rows, bias)

    assert torch.autograd.gradcheck(run, (x, bias, *cores))


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_gradients_are_those_of_the_dense_product(make):
    """Both ways of both products, through torch's own derivatives of `rebuild`."""
    x, cores, n, m, rows, *bias = make(grad=True, dtype=torch.float64)
    wanted = [t for t in (x, *cores, *bias) if t is not None and t.requires_grad]
    weight = math_of.rebuild(cores, n, m)[:rows]
    want = torch.nn.functional.linear(x, weight, *bias) if bias else weight[x]
    got = LINEAR(x, cores, n, m, rows, *bias) if bias else EMBEDDING(x, cores, n, m, rows)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy)):
        # Sums of some thousand products in float64, in another order.
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.parametrize("make", EMBEDDING_SAMPLES)
def test_gradients_of_the_embedding_op(make):
    ids, cores, n, m, rows = make(grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *cores: EMBEDDING(ids, list(cores), n, m, rows), tuple(cores))


def test_gradients_only_where_asked_for():
    x, cores, n, m, rows, bias = linear_sample()
    cores[1].requires_grad_()
    LINEAR(x, cores, n, m, rows, bias).sum().backward()
    assert cores[1].grad is not None
    assert x.grad is None
    assert cores[0].grad is None
    with torch.no_grad():
        assert LINEAR(x, cores, n, m, rows, bias).requires_grad is False


def test_nothing_but_x_and_the_cores_is_kept_for_backward():
    for tokens in (2, 300):  # contracted, rebuilt
        x, cores, n, m, rows, bias = linear_sample(tokens=(tokens,), grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            LINEAR(x, cores, n, m, rows, bias)
        assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, *cores)}


def test_less_than_a_quarter_of_what_einsums_keep_is_kept():
    for shapes, rank in memory.LAYERS:
        x, cores, weight = memory.layer(shapes, rank, tokens=256)
        n, m = zip(*shapes)
        assert torch.allclose(memory.einsums(x, cores, shapes), x @ weight.T, rtol=1e-3, atol=1e-3)
        naive = memory.kept_bytes(partial(memory.einsums, x, cores, shapes))
        ours = memory.kept_bytes(partial(LINEAR, x, cores, n, m, len(weight), None))
        assert ours == (x.numel() + sum(c.numel() for c in cores)) * 4
        assert naive >= memory.BAR * ours


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_is_the_row_of_the_dense_table(dtype):
    cores, n, m, ranks = train_of(UNEVEN, 5)
    table = dense_of(cores, UNEVEN, ranks)
    for ids in (torch.arange(24), torch.tensor([[3, 3], [0, 23]]), torch.tensor(7), torch.zeros(2, 0)):
        got = EMBEDDING(ids.to(dtype), cores, n, m, 24)
        # Products of four numbers, summed over 5 x 5 x 5 paths, in float64.
        assert torch.allclose(got, table[ids.long()], rtol=1e-12, atol=1e-12)


def test_a_lookup_makes_only_the_rows_it_is_asked_for_and_each_once():
    cores, n, m, ranks = train_of(PAPER[0][3], 16, torch.float32)
    ids = torch.tensor([5, 3071, 5, 17, 5])
    with FlopCounterMode(display=False) as counter:
        math_of.rows_at(ids, cores, n, m)
    claimed = embedding_op.cost(3, n, m, ranks, 0, 4).flops
    assert counter.get_total_flops() == claimed
    assert claimed < math_of.rebuild_flops(n, m, ranks) / 50


@pytest.mark.parametrize("bad", [22, 23, 24, 2000, -1])
def test_an_id_outside_the_vocabulary_is_an_index_error_even_where_padding_has_a_row(bad):
    _, cores, n, m, rows = embedding_sample(rows=22)
    assert EMBEDDING(torch.tensor([0, 21]), cores, n, m, rows).shape == (2, 24)
    with pytest.raises(IndexError, match="out of range"):
        EMBEDDING(torch.tensor([0, bad]), cores, n, m, rows)
