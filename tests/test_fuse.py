"""Fusion: the same bits as before, nothing observable folded away, everything else folded."""

import math

import pytest
import torch
from torch import nn

from fxcompress.core.show import show
from fxcompress.passes.fuse import FUSED, PARALLEL, fuse
from tests.fusing import FACTORED, QUANTIZED, D, H, Net, both, calls, programs, rewritten, steps

aten = torch.ops.aten


class TestVertical:
    @pytest.mark.parametrize("specs", [QUANTIZED, FACTORED, "low_rank{rank=4}"])
    def test_a_product_its_weights_and_what_follows_are_one_node(self, specs):
        _, done = both(lambda n, x: n.d(nn.functional.gelu(n.a(x), approximate="tanh")) * 0.5 + x, specs=specs)
        product = "linear" if specs == QUANTIZED else "low_rank_linear"
        assert steps(done) == [[product, "gelu"], [product, "mul", "add"]]
        assert calls(done) == []

    def test_the_spec_says_all_of_it(self):
        _, done = both(lambda n, x: n.a(x).relu() * 2)
        assert programs(done) == [
            f"linear(x, dequantize(uint8[{H}, 24], uint8[{H}, 2], uint8[{H}, 1], float32[2], bits=4, group_size=32, "
            f"columns={D}, dtype=float32), float32[{H}]) | relu(_) | mul(_, 2)"
        ]

    def test_an_activation_written_out_is_folded_though_its_parts_are_read_twice(self):
        def gelu(n, x):
            y = n.a(x)
            return y * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

        _, done = both(gelu)
        assert calls(done) == []
        assert len(steps(done)) == 1

    def test_dropout_in_eval_mode_and_casts_to_the_same_dtype_vanish(self):
        _, done = both(lambda n, x: nn.functional.dropout(n.a(x), 0.1, False).to(torch.float32).relu())
        assert steps(done) == [["linear", "relu"]]
        assert calls(done) == []

    def test_a_cast_that_changes_something_is_a_step(self):
        _, done = both(lambda n, x: n.a(x).to(torch.bfloat16).relu().to(torch.float32))
        assert steps(done) == [["linear", "to", "relu", "to"]]

    def test_a_product_of_rows_returns_to_the_dimensions_of_its_input(self):
        def rows(n, x):
            y = n.a(x.view(-1, D)).relu().view(x.shape[0], x.shape[1], H)
            return torch.tanh(y)

        _, done = both(rows)
        assert programs(done)[0].startswith("linear(rows, ")
        assert steps(done) == [["linear", "relu", "unrows", "tanh"]]
        assert calls(done) == []

    def test_two_products_of_one_input_that_meet_are_one_node(self):
        gm, done = both(lambda n, x: n.d(nn.functional.silu(n.a(x)) * n.b(x)))
        assert steps(done) == [["linear", "silu", "linear", "mul"], ["linear"]]
        _, other = both(lambda n, x: n.d(n.b(x) * nn.functional.silu(n.a(x))))
        assert steps(other)[0] == ["linear", "linear", "silu", "mul"]
        assert len(list(gm.graph.nodes)) > len(list(done.graph.nodes))

    def test_a_gate_written_out_joins_as_well(self):
        def gated(n, x):
            up = n.b(x)
            gate = n.a(x)
            return up * (gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))

        _, done = both(gated)
        assert len(steps(done)) == 1
        assert calls(done) == []

    def test_a_dense_product_beside_a_compressed_one_stays_outside(self):
        _, done = both(lambda n, x: nn.functional.silu(n.a(x)) * n.b(x), specs={"a": QUANTIZED})
        assert steps(done) == [["linear", "silu", "mul"]]
        assert calls(done) == ["linear"]
        assert len(done.graph.find_nodes(op="call_function", target=FUSED)[0].args[2]) == 1

    def test_x_itself_can_be_the_residual(self):
        _, done = both(lambda n, x: n.a(x[..., :D]).mul(1.5), specs=FACTORED)
        _, done = both(lambda n, x: (n.d(n.a(x)) + x).relu())
        assert steps(done)[-1] == ["linear", "add", "relu"]
        (node,) = [n for n in done.graph.nodes if n.target is FUSED and n.args[2]]
        assert node.args[2][0].op == "placeholder"

    def test_a_product_that_others_read_as_well_stays_outside(self):
        _, done = both(lambda n, x: (y := n.b(x), nn.functional.silu(n.a(x)) * y))
        assert steps(done) == [["linear"], ["linear", "silu", "mul"]]

    def test_what_is_no_product_is_not_taken_in_with_its_operand(self):
        _, done = both(lambda n, x, y: n.a(x) * y.relu(), torch.randn(3, 5, H))
        assert steps(done) == [["linear", "mul"]]
        assert calls(done) == ["relu"]

    def test_an_activation_read_twice_is_one_extra(self):
        _, done = both(lambda n, x, y: (n.a(x) * y).tanh() + y, torch.randn(3, 5, H))
        (node,) = done.graph.find_nodes(op="call_function", target=FUSED)
        assert len(node.args[2]) == 1
        assert programs(done)[0].endswith("| mul(_, extra[0]) | tanh(_) | add(_, extra[0])")

    def test_a_scale_kept_as_a_tensor_is_a_constant(self):
        def scaled(n, x):
            return n.a(x) * n.b.bias

        _, done = both(scaled, specs={"a": QUANTIZED})
        assert programs(done)[0].endswith(f"| mul(_, float32[{H}])")


class TestNorms:
    def test_a_norm_joins_the_one_node_that_reads_it(self):
        _, done = both(lambda n, x: n.a(n.norm(x)))
        assert steps(done) == [["layer_norm", "linear"]]
        assert calls(done) == []

    def test_it_joins_a_node_of_several_products(self):
        _, done = both(lambda n, x: (lambda y: (n.a(y).softmax(-1), n.b(y).softmax(-1)))(n.norm(x)))
        assert steps(done) == [["layer_norm", "linear", "linear"]]

    def test_an_rms_norm_of_torch_and_one_that_is_written_out(self):
        def written_out(n, x):
            return n.a(n.norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))

        _, done = both(written_out)
        assert steps(done) == [["pow", "mean", "add", "rsqrt", "mul", "mul", "linear"]]
        _, done = both(lambda n, x: n.a(nn.functional.rms_norm(x, (D,), n.norm.weight)))
        assert steps(done) == [["rms_norm", "linear"]]

    def test_a_norm_behind_a_product_ends_its_node(self):
        _, done = both(lambda n, x: n.norm(n.d(n.a(x).relu()) + x))
        assert steps(done) == [["linear", "relu"], ["linear", "add", "layer_norm"]]

    def test_a_norm_that_others_read_stays(self):
        _, done = both(lambda n, x: (lambda y: n.d(n.a(y).relu()) + y)(n.norm(x)))
        assert steps(done) == [["linear", "relu"], ["linear", "add"]]
        assert calls(done) == ["layer_norm"]

    def test_a_mean_over_another_dimension_is_no_norm(self):
        _, done = both(lambda n, x: n.a(x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)))
        assert steps(done) == [["linear"]]

    def test_what_is_pointwise_alone_is_left_before_the_product(self):
        _, done = both(lambda n, x: n.a(x.relu() * 2))
        assert steps(done) == [["linear"]]


class TestNeverFused:
    def test_a_graph_without_our_ops(self):
        gm, done = both(lambda n, x: n.d(n.a(x).relu()) + x, specs=None)
        assert show(gm) == show(done)
        assert done is not gm

    def test_what_is_returned(self):
        def body(n, x):
            y = n.a(x)
            z = y.relu()
            return y, z, z.tanh()

        _, done = both(body)
        assert steps(done) == [["linear"]]
        assert calls(done) == ["relu", "tanh"]

    def test_what_another_node_reads(self):
        def body(n, x):
            y = n.a(x).relu()
            return y.tanh() + y.sum()

        _, done = both(body)
        assert steps(done) == [["linear", "relu"]]
        assert calls(done) == ["tanh", "sum", "add"]

    def test_a_result_that_broadcasting_makes_larger(self):
        _, done = both(lambda n, x: n.a(x).relu() + torch.ones(2, 1, 1, 1))
        assert steps(done) == [["linear", "relu"]]
        assert calls(done) == ["ones", "add"]

    def test_a_smaller_branch_is_not_mistaken_for_the_product(self):
        # the other product of x is broadcast over this one's rows
        _, done = both(lambda n, x: n.a(x) * n.b(x[:1]).relu())
        assert steps(done) == [["linear", "relu"], ["linear", "mul"]]

    def test_a_product_of_another_width_as_a_part_of_this_one(self):
        _, done = both(lambda n, x: n.a(x) * n.f(x).sigmoid())
        assert steps(done) == [["linear", "sigmoid"], ["linear", "mul"]]
        _, done = both(lambda n, x: n.a(x) * n.f(x))
        assert steps(done) == [["linear"], ["linear", "mul"]]

    def test_dropout_that_drops(self):
        gm = rewritten(Net(lambda n, x: nn.functional.dropout(n.a(x).relu(), 0.5, True).tanh()), (torch.ones(2, 3, D),))
        assert steps(fuse(gm)) == [["linear", "relu"]]

    def test_reshapes_that_do_more_than_flatten_and_return(self):
        def halves(n, x):
            return n.a(torch.cat([x, x], -1).reshape(-1, D)).relu().reshape(2 * x.shape[0], x.shape[1], H).tanh()

        _, done = both(halves)
        assert programs(done)[0].startswith("linear(x, ")
        assert steps(done) == [["linear", "relu"]]

        def joined(n, x):
            return n.a(x.reshape(-1, D)).relu().reshape(x.shape[0], x.shape[1] * H).tanh()

        _, done = both(joined)
        assert programs(done)[0].startswith("linear(rows, ")
        assert steps(done) == [["linear", "relu"]]

    def test_a_result_whose_strides_are_those_of_the_residual(self):
        # A sum is laid out like its first operand.
        y = torch.randn(D, 3, 5).permute(1, 2, 0)
        _, done = both(lambda n, x, y: y + n.d(n.a(x).relu()), y)
        assert steps(done) == [["linear", "relu"], ["linear"]]
        _, done = both(lambda n, x, y: n.d(n.a(x).relu()) + y, y)
        assert steps(done) == [["linear", "relu"], ["linear", "add"]]

    def test_across_a_write_in_place(self):
        def body(n, x, y):
            h = n.a(x)
            z = y * 1
            h = h.tanh()
            z.add_(1)
            return (h + z).relu()

        _, done = both(body, torch.randn(3, 5, H))
        assert steps(done) == [["linear", "tanh"]]
        assert calls(done) == ["mul", "add_", "add", "relu"]

    def test_a_write_in_place_itself(self):
        _, done = both(lambda n, x: n.a(x).relu_().tanh())
        assert steps(done) == [["linear"]]
        assert calls(done) == ["relu_", "tanh"]

    def test_a_factor_that_is_a_size(self):
        _, done = both(lambda n, x: n.a(x).relu() * x.shape[1])
        assert steps(done) == [["linear", "relu"]]
        assert calls(done) == ["mul"]

    def test_a_weight_that_two_products_read(self):
        gm, _ = both(lambda n, x: n.a(x))
        (read,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fxcompress.dequantize.default)
        (product,) = read.users
        with gm.graph.inserting_after(product):
            again = gm.graph.call_function(aten.linear.default, product.args)
        again.meta.update(product.meta)
        product.replace_all_uses_with(again)
        gm.graph.output_node().args = ((product, again),)
        gm.recompile()
        assert programs(fuse(gm)) == []


class TestHorizontal:
    def test_parallel_products_are_one_node_of_several_outputs(self):
        def body(n, x):
            return tuple(torch.unflatten(f(x), -1, (4, -1)).transpose(1, 2) for f in (n.a, n.b, n.c))

        _, done = both(body)
        assert steps(done) == [["linear"] * 3]
        (node,) = done.graph.find_nodes(op="call_function", target=PARALLEL)
        assert [v.shape[-1] for v in node.meta["val"]] == [H] * 3
        assert len(node.args[1]) == 15

    def test_formats_and_epilogues_may_differ(self):
        _, done = both(
            lambda n, x, y: (n.a(x).relu() + y, n.b(x), n.c(x) * y),
            torch.randn(3, 5, H),
            specs={"a": "quantize{bits=8, group_size=0}", "b": FACTORED, "c": QUANTIZED},
        )
        assert steps(done) == [["linear", "relu", "add", "low_rank_linear", "linear", "mul"]]
        (node,) = done.graph.find_nodes(op="call_function", target=PARALLEL)
        assert len(node.args[2]) == 1
        assert programs(done)[0].endswith("| outputs(step[2], step[3], _)")

    def test_what_needs_an_output_of_the_run_is_not_in_it(self):
        _, done = both(lambda n, x: (h := n.a(x).relu(), n.b(x) * h.sum(-1, keepdim=True)))
        assert steps(done) == [["linear", "relu"], ["linear", "mul"]]
        # read directly, by a part that does not end up in the same group: h is returned
        _, done = both(lambda n, x: (h := n.a(x), n.b(x).relu() + h))
        assert steps(done) == [["linear"], ["linear", "relu", "add"]]

    def test_products_far_apart_stay_apart(self):
        # keys and values of all layers read one encoder output; at once they would all be alive
        def body(n, x):
            h = n.a(x).softmax(-1)
            h = n.e(h).softmax(-1)
            return n.b(x).softmax(-1) + h

        _, done = both(body)
        assert steps(done) == [["linear"]] * 3

    def test_a_write_in_place_between_them_keeps_them_apart(self):
        def body(n, x, y):
            z = y * 1
            h = n.a(x) + z
            z.mul_(2)
            return h.softmax(-1), n.b(x) + z

        _, done = both(body, torch.randn(3, 5, H))
        assert steps(done) == [["linear", "add"], ["linear", "add"]]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(D, H), nn.Linear(D, H)

    def forward(self, x):
        y = self.gate(x)
        y = nn.functional.silu(y)
        return y * self.up(x)


def test_notes_and_stack_traces_are_those_of_all_members():
    gm = rewritten(Gated(), (torch.randn(3, 5, D),))
    done = fuse(gm)
    (node,) = done.graph.find_nodes(op="call_function", target=FUSED)
    assert node.meta["fxcompress"] == f"{QUANTIZED}, was aten.linear at gate; {QUANTIZED}, was aten.linear at up"
    lines = [line.strip() for line in node.meta["stack_trace"].splitlines() if not line.strip().startswith("File")]
    linear = "return F.linear(input, self.weight, self.bias)"
    assert lines == ["y = self.gate(x)", linear, "y = nn.functional.silu(y)", "return y * self.up(x)", linear]
    (before,) = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    assert node.meta["val"] is before.meta["val"]
    assert node.meta["nn_module_stack"] == before.meta["nn_module_stack"]
