"""The ops of block grids, the same questions to each: the product with the dense weight, gradients, graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.codegen.ops.block_low_rank_linear import product
from fxcompress.core.capture import capture
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.monarch import Monarch
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quaternion import Quaternion
from fxcompress.passes.recipe import Recipe
from tests.sites import site_of

GRIDS = pytest.mark.parametrize("grid", [BlockLowRank, Monarch], ids=lambda grid: grid.name)


def operands(blocks=4, rank=3, tokens=(2, 5), bias=True, dtype=torch.float32, grad=False, rows=12, columns=20):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*tokens, columns), (blocks * rank, columns), (rows, blocks * rank)]
    x, v, u = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes)
    b = torch.randn(rows, generator=generator, dtype=dtype).requires_grad_(grad) if bias else None
    return x, v, u, blocks, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(2, 5), (), (0,), (1,), (3, 0, 2)])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@GRIDS
def test_the_op_is_the_product_with_its_dense_weight(grid, blocks, tokens, bias):
    args = operands(blocks, 3, tokens, bias)
    x, v, u, _, b = args
    structure, site = grid(blocks, 3), site_of(torch.ones(12, 20))
    weight = structure.dense({"v": v, "u": u}, site)
    want = torch.nn.functional.linear(x.double(), weight, None if b is None else b.double())
    got = grid.op(*args)
    size = x.abs().double() @ structure.dense({"v": v.abs(), "u": u.abs()}, site).T + (0 if b is None else b.abs())
    # Sums of 20 / blocks and of 3 blocks products and a bias, each rounded by 2^-24 of its magnitude at most.
    assert bool(((got - want).abs() <= (20 + 12 + 1) * 2**-24 * size).all())
    fake = grid.op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (got.shape, got.dtype, got.stride())
    assert set(torch.library.opcheck(grid.op, args).values()) == {"SUCCESS"}


@GRIDS
def test_blocks_of_one_output_still_give_a_contiguous_answer(grid):
    args = operands(4, 1, (5,), rows=4)
    assert grid.op(*args).is_contiguous()
    assert set(torch.library.opcheck(grid.op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("tokens", [(2, 3), (), (0,)])
@GRIDS
def test_the_gradient_of_the_op_is_that_of_the_product(grid, tokens):
    x, v, u, blocks, b = operands(2, 2, tokens, dtype=torch.float64, grad=True, rows=6, columns=4)
    assert torch.autograd.gradcheck(lambda *a: grid.op(*a[:3], blocks, a[3]), (x, v, u, b))
    assert set(torch.library.opcheck(grid.op, operands(2, 2, (3,), grad=True)).values()) == {"SUCCESS"}


@GRIDS
def test_backward_keeps_the_inputs_and_nothing_else(grid):
    x, v, u, blocks, b = operands(grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        grid.op(x, v, u, blocks, b)
    assert sorted(kept) == sorted(t.data_ptr() for t in (x, v, u))


def test_the_dense_weight_is_never_built():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen = max(self.seen, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    x, v, u, blocks, _ = operands(4, 1, (2,), rows=64, columns=64)
    with Largest() as mode:
        product(x, v, u.unflatten(0, (blocks, 16)))
    assert 0 < mode.seen <= v.numel() < 64 * 64


@pytest.mark.parametrize("storage", [None, Quantize(8, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", [BlockLowRank(4, 2), Monarch(4, 2), Quaternion()], ids=str)
def test_it_takes_its_place_in_a_graph(structure, bias, storage):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(20, 12, bias=bias)), torch.randn(3, 20)
    gm = capture(model, (x,))
    (site,) = find_sites(gm)
    recipe = Recipe(structure, storage)
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    made.apply(gm, site)
    finish(gm)
    want = torch.nn.functional.linear(x, made.weight, model[0].bias)
    op = getattr(torch.ops.fxcompress, f"{structure.name}_linear").default
    assert any(node.target is op for node in gm.graph.nodes)
    assert float((gm(x) - want).detach().abs().max()) < 1e-5  # sums of 20 in float32, in another order
