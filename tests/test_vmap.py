"""torch.vmap over the ops equals a loop over its elements."""

import inspect

import pytest
import torch

import fxcompress.codegen.ops as ops
from fxcompress.codegen.ops import OPS
from tests.test_fused_op import FLOATS, SEVERAL, SINGLE, H, example


def agree(function, *batched, in_dims=0):
    """`function` under vmap and element by element."""
    made = torch.vmap(function, in_dims=in_dims)(*batched)
    want = [function(*each) for each in zip(*(b.unbind(in_dims) for b in batched))]
    if isinstance(made, torch.Tensor):
        made, want = [made], [[w] for w in want]
    for got, *expected in zip(made, *want):
        # A larger product may add up in another order: 2^-24 of a few dozen terms of size 1.
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_dims", [0, 1])
@pytest.mark.parametrize("text", [SINGLE, FLOATS])
def test_fused_over_a_batch_of_inputs(text, in_dims):
    x, tensors, extras, _ = example(text, (4, 3, 2), extras=[(H,)])
    agree(lambda x: ops.fused.fused(x, tensors, extras, text, "up"), x, in_dims=in_dims)


def test_fused_over_inputs_and_activations_together():
    x, tensors, _, _ = example(SINGLE, (4, 3))
    residual = torch.randn(4, 3, H)
    agree(lambda x, r: ops.fused.fused(x, tensors, [r], SINGLE), x, residual)


def test_several_outputs():
    x, tensors, extras, _ = example(SEVERAL, (4, 3), extras=[(H,)])
    agree(lambda x: ops.fused.fused_parallel(x, tensors, extras, SEVERAL), x)


def test_an_ensemble_of_weights():
    x, v, u = torch.randn(3, 8), torch.randn(4, 2, 8), torch.randn(4, 6, 2)
    agree(lambda v, u: ops.low_rank_linear.low_rank_linear(x, v, u), v, u)
    agree(lambda u: ops.low_rank_linear.low_rank_linear(x, v[0], u), u)


def test_a_lookup_and_what_has_no_leading_dimensions_of_its_own():
    ids, codes, scales = torch.randint(0, 9, (4, 3)), torch.randint(0, 120, (9, 8), dtype=torch.uint8), torch.rand(9, 1)
    agree(lambda ids: ops.float8_embedding.float8_embedding(ids, codes, scales, torch.float32), ids)
    agree(lambda c: ops.dequantize_float8.dequantize_float8(c, scales, torch.float32), torch.stack([codes, codes // 2]))


def test_gradients_through_it():
    x, tensors, extras, _ = example(FLOATS, (4, 3), extras=[(H,)])
    x.requires_grad_()
    torch.vmap(lambda x: ops.fused.fused(x, tensors, extras, FLOATS, "up"))(x).square().sum().backward()
    got, x.grad = x.grad, None
    ops.fused.fused(x, tensors, extras, FLOATS, "up").square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op._name)
def test_every_op_has_a_rule(op):
    assert op._vmap_fn is not None
    assert "in_dims" in inspect.signature(op._vmap_fn).parameters
