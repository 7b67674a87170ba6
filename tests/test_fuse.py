"""Fusion: the same bits as before, nothing observable folded away, everything else folded."""

import fnmatch
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxcompress
from benchmarks.models import minilm
from fxcompress.codegen.ops.fused import fused, fused_parallel
from fxcompress.codegen.spec import op_of, parse
from fxcompress.core.capture import capture
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric
from fxcompress.core.show import show
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish, own_tensors, stored_bytes
from fxcompress.passes import REWRITES, recipe
from fxcompress.passes.fuse import FUSED, HEADS, OWN, PARALLEL, fuse
from fxcompress.passes.quantize import Quantize

aten = torch.ops.aten
QUANTIZED = "quantize{bits=4, group_size=32}"
FACTORED = "low_rank{rank=4} | quantize{bits=8, group_size=0}"
D, H = 48, 80


def rewritten(model, inputs, specs=QUANTIZED):
    """The captured graph with a recipe at every site whose name matches (the first pattern wins, None keeps)."""
    gm = capture(model, inputs)
    for site in find_sites(gm):
        patterns = specs if isinstance(specs, dict) else {"*": specs}
        spec = next((s for pattern, s in patterns.items() if fnmatch.fnmatch(site.name, pattern)), None)
        if spec is not None:
            recipe.parse(spec, REWRITES).make(site).apply(gm, site)
    finish(gm)
    own_tensors(gm)
    return gm


def same(a, b):
    """Bits, dtypes, shapes and strides of every output; NaNs too."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))


def programs(gm):
    return [n.args[3] for n in gm.graph.nodes if n.target in (FUSED, PARALLEL)]


def steps(gm):
    """The names of the steps of every fused node."""
    return [[call.name for call in parse(text).steps] for text in programs(gm)]


def calls(gm):
    """Every other call, sizes left out."""
    names = [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]
    return [n.split(".")[0] for n in names if not n.startswith(("fxcompress.fused", "sym_size", "<built-in"))]


class Net(nn.Module):
    """Linears a, b, c (D -> H), d (H -> D) and `body(self, x, *others)`."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.e = nn.Linear(H, H, bias=False)
        self.norm, self.body = nn.LayerNorm(D), body

    def forward(self, x, y=None):
        return self.body(self, x) if y is None else self.body(self, x, y)


def both(body, *others, specs=QUANTIZED):
    """-> (graph, fused graph) of a Net, after checking them against each other at two sizes."""
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, D), *others)
    gm = rewritten(Net(body), inputs, specs)
    before, small = show(gm), tuple(t[:2, :4].contiguous() if t.dim() == 3 else t for t in inputs)
    done = fuse(gm)
    assert show(gm) == before
    with torch.no_grad():
        same(gm(*inputs), done(*inputs))
        same(gm(*small), done(*small))
    assert show(fuse(done)) == show(done)
    assert stored_bytes(gm) == stored_bytes(done)
    assert dict(gm.named_parameters()).keys() == dict(done.named_parameters()).keys()
    return gm, done


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

    def test_a_scale_kept_as_a_tensor_is_a_constant(self):
        def scaled(n, x):
            return n.a(x) * n.b.bias

        _, done = both(scaled, specs={"a": QUANTIZED})
        assert programs(done)[0].endswith(f"| mul(_, float32[{H}])")


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


# Random programs ------------------------------------------------------------------------------------------------------

UNARY = ["relu", "tanh", "sigmoid", "silu", "gelu", "neg", "exp", "abs", "sqrt", "rsqrt", "erf"]
BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"]


@st.composite
def random_programs(draw):
    """-> (leading sizes, products, extras' shapes, steps [(op, operand, operand)], values returned beside the last).

    Operands number the values made so far, the products first; -1, -2, ... the extras; a float is itself.
    """
    kinds = st.sampled_from(["quantized", "factored", "factored and quantized", "dense"])
    products = ["quantized", *draw(st.lists(kinds, max_size=2))]
    lead = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    full = [*lead, 8]
    extras = []
    for _ in range(draw(st.integers(0, 3))):
        shape = [draw(st.sampled_from([1, size])) for size in full[draw(st.integers(0, len(full))) :]]
        larger = draw(st.integers(0, 9)) == 0
        extras.append(([2, *[1] * (len(full) - len(shape)), *shape] if larger else shape, draw(st.booleans())))
    program = []
    for at in range(len(products) - 1, len(products) - 1 + draw(st.integers(0, 8))):
        # mostly the newest value, or everything would be observable
        value = st.one_of(st.just(at), st.just(at), st.integers(0, at))
        if draw(st.integers(0, 11)) == 0:
            program.append((draw(st.sampled_from(["relu_", "sigmoid_"])), draw(value), None))
        elif draw(st.booleans()):
            program.append((draw(st.sampled_from(UNARY)), draw(value), None))
        else:
            name = draw(st.sampled_from(BINARY))
            number = st.floats(-2, 2, width=32) if name not in ("maximum", "minimum") else value
            operand = draw(st.one_of(value, st.integers(-len(extras), -1) if extras else value, number))
            pair = [draw(value), operand]
            program.append((name, *(pair if isinstance(operand, float) else draw(st.permutations(pair)))))
    values = len(products) + len(program)
    returned = draw(st.sets(st.integers(0, values - 1), max_size=draw(st.integers(0, 2))))
    return lead, products, extras, program, sorted(returned)


def built(case):
    """The graph of a program, every `val` a real tensor -> (gm, inputs)."""
    lead, products, extras, program, returned = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    root, graph = nn.Module(), fx.Graph()
    inputs = [draw(*lead, 6)]
    for shape, flipped in extras:
        inputs.append(draw(*reversed(shape)).permute(list(reversed(range(len(shape))))) if flipped else draw(*shape))
    values = {}  # node -> what it is before anything is written to it

    def call(op, *args):
        node = graph.call_function(op, args)
        node.meta["val"] = op(*pytree.tree_map(lambda a: values[a] if isinstance(a, fx.Node) else a, args))
        values[node] = node.meta["val"]
        return node

    def constant(name, tensor):
        root.register_buffer(name, tensor)
        node = graph.get_attr(name)
        values[node] = node.meta["val"] = tensor
        return node

    def matrix(name, rows, columns, storage):
        weight = draw(rows, columns)
        if storage is None:
            return constant(name, weight)
        encoded = storage.encode(weight, Metric())
        reads = [constant(f"{name}_{key}", encoded[key]) for key in storage.keys]
        return call(torch.ops.fxcompress.dequantize.default, *reads, *storage.constants(weight))

    nodes = []
    for i, value in enumerate(inputs):
        node = graph.placeholder(f"in{i}")
        node.meta["val"], values[node] = value, value.clone()
        nodes.append(node)
    made = []
    for i, kind in enumerate(products):
        storage = Quantize(4, 0) if "quantized" in kind else None
        bias = constant(f"{i}_bias", draw(8))
        if "factored" in kind:
            factors = matrix(f"{i}_v", 2, 6, storage), matrix(f"{i}_u", 8, 2, storage)
            made.append(call(torch.ops.fxcompress.low_rank_linear.default, nodes[0], *factors, bias))
        else:
            made.append(call(aten.linear.default, nodes[0], matrix(f"{i}_w", 8, 6, storage), bias))
    for name, *operands in program:
        args = [made[i] if i >= 0 else nodes[-i] for i in operands if isinstance(i, int)]
        args += [i for i in operands if isinstance(i, float)]
        op = op_of(name) if not name.endswith("_") else getattr(aten, name).default
        made.append(call(op, *args))
    graph.output(tuple(made[i] for i in [*returned, len(made) - 1]))
    return SignedModule(root, graph), inputs


def run(gm, inputs):
    return gm.forward(*[t.clone() for t in inputs])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_programs())
def test_random_programs_keep_their_bits(case):
    gm, inputs = built(case)
    before = len(gm.graph.nodes)
    done = fuse(gm)
    same(run(gm, inputs), run(done, inputs))
    for node in done.graph.find_nodes(op="call_function", target=FUSED):
        assert list(node.meta["val"].shape) == [*case[0], 8]
    assert len(gm.graph.nodes) == before
    assert not any(n.target in OWN for n in done.graph.nodes)
    chain = len(case[1]) == 1 and all(name in UNARY and value == at for at, (name, value, *_) in enumerate(case[3]))
    if chain and set(case[4]) <= {len(case[3])}:  # nothing on the way is seen: nothing may be left
        assert [n.target for n in done.graph.nodes if n.op == "call_function"] == [FUSED]


def test_random_programs_are_of_both_kinds():
    """The property above says something: some programs are folded whole, and some must keep calls outside."""
    whole = built(([2], ["quantized"], [([2, 8], False)], [("gelu", 0, None), ("add", 1, -1)], []))[0]
    seen = built(([2], ["quantized"], [([2, 8], False)], [("gelu", 0, None), ("add", 1, -1)], [1]))[0]
    assert (steps(fuse(whole)), calls(fuse(whole))) == ([["linear", "gelu", "add"]], [])
    assert (steps(fuse(seen)), calls(fuse(seen))) == ([["linear", "gelu"]], ["add"])


# The op ---------------------------------------------------------------------------------------------------------------


def example(text, lead=(2, 5), dtype=torch.float32, extras=()):
    """Inputs for a spec whose quantized weights are (H, D)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = []
    for constant in parse(text).constants:
        if constant.dtype is torch.uint8:
            tensors.append(torch.randint(0, 256, constant.shape, generator=generator, dtype=torch.uint8))
        else:
            # a grid: scales of 2^-4 to 2^-4 + 255/128
            tensors.append(torch.tensor([-4.0, 1 / 128]) if constant.shape == (2,) else draw(*constant.shape))
    return draw(*lead, D), tensors, [draw(*shape) for shape in extras], text


DEQUANTIZE = f"dequantize(uint8[{H}, 24], uint8[{H}, 2], uint8[{H}, 1], float32[2], bits=4, group_size=32, columns=48, "
SINGLE = f"linear(x, {DEQUANTIZE}dtype=float32), float32[{H}]) | gelu(_) | add(_, extra[0]) | mul(step[1], _)"
FACTORS = f"float32[4, {D}], float32[{H}, 4], float32[{H}]"
FLOATS = f"low_rank_linear(rows, {FACTORS}) | unrows(_) | tanh(_) | mul(_, extra[0])"
TWICE = f"{FLOATS} | sigmoid(_) | outputs(step[2], _)"
SEVERAL = f"{SINGLE} | low_rank_linear(x, {FACTORS}) | silu(_) | outputs(step[3], _)"


@pytest.mark.parametrize("lead", [(2, 5), (3,), (), (0, 5)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "text"), [(fused, SINGLE), (fused, FLOATS), (fused_parallel, SEVERAL)])
def test_torch_accepts_the_op(op, text, lead, grad):
    if "rows" in text and lead == ():
        lead = (1,)
    x, tensors, extras, _ = example(text, lead, extras=[(H,)])
    for t in (x, *tensors, *extras):
        t.requires_grad_(grad and t.is_floating_point() and t.shape != (2,))
    assert set(torch.library.opcheck(op, (x, tensors, extras, text)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "text"), [(fused, FLOATS), (fused_parallel, TWICE)])
def test_gradients_are_right_in_float64(op, text):
    text = text.replace("float32", "float64")
    x, tensors, extras, _ = example(text, (2,), torch.float64, [(H,)])
    inputs = [t.requires_grad_() for t in (x, *tensors, *extras)]
    n = len(tensors)
    assert torch.autograd.gradcheck(lambda x, *ts: op(x, list(ts[:n]), list(ts[n:]), text), inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_unfused_graph(compiled):
    def body(n, x, y):
        return n.d(nn.functional.silu(n.a(x)) * n.b(x)) + y

    y = torch.randn(3, 5, D)
    gm, done = both(body, y, specs={"a": QUANTIZED, "*": FACTORED})
    torch.manual_seed(1)
    x = torch.randn(3, 5, D)

    def gradients(gm):
        gm = gm.copy()
        for name, parameter in gm.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
            parameter.grad = None
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        run = torch.compile(gm, backend="aot_eager", fullgraph=True) if compiled and gm is not None else gm
        run(*leaves).square().sum().backward()
        return [t.grad for t in (*leaves, *(p for p in gm.parameters() if p.requires_grad))]

    want, got = gradients(gm), gradients(done)
    assert len(want) == 2 + 3
    for a, b in zip(want, got):  # sums of gradients in another order: 2^-24 a term, a few dozen terms
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    x, tensors, extras, text = example(FLOATS, extras=[(H,)])
    tensors[1].requires_grad_()
    fused(x, tensors, extras, text).sum().backward()
    assert tensors[1].grad is not None
    assert x.grad is tensors[0].grad is extras[0].grad is None


def test_an_unused_output_costs_no_gradient():
    x, tensors, extras, text = example(SEVERAL, extras=[(H,)])
    x.requires_grad_()
    fused_parallel(x, tensors, extras, text)[1].sum().backward()
    want = x.detach().clone().requires_grad_()
    fused(want, tensors[-3:], [], text.split(" | ", 4)[4].removesuffix(" | outputs(step[3], _)")).sum().backward()
    assert torch.equal(x.grad, want.grad)


def test_tensors_that_are_not_those_of_the_spec_are_refused():
    x, tensors, extras, text = example(FLOATS, extras=[(H,)])
    with pytest.raises(SpecError, match="the program takes 3 constants and 1 extras; 3 and 0 were given"):
        fused(x, tensors, [], text)
    with pytest.raises(SpecError, match="the program takes 3 constants and 1 extras; 2 and 1 were given"):
        fused(x, tensors[:2], extras, text)
    wrong = r"tensors\[1\] is torch.float16 \[80, 4\]; the program was made for torch.float32 \[80, 4\]. Convert a"
    with pytest.raises(SpecError, match=wrong):
        fused(x, [tensors[0], tensors[1].half(), tensors[2]], extras, text)


# Whole models ---------------------------------------------------------------------------------------------------------


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
    per_layer = [["linear", "unrows"], ["linear", "unrows", "add"]]
    gelu = ["linear", "unrows", "mul", "pow", "mul", "add", "mul", "tanh", "add", "mul"]
    assert steps(done)[:4] == [*per_layer, gelu, per_layer[1]]


def test_minilm_keeps_its_bits(data):
    inputs = minilm.batches(["A man is playing a harp.", "Two dogs run.", "It rains today in the north."])[0]
    specs = {"embeddings*": None, "pooler*": None, "*attention.output*": FACTORED, "*": QUANTIZED}
    gm = rewritten(data(minilm.model), inputs, specs)
    done = fuse(gm)
    with torch.no_grad():
        same(gm(**inputs), done(**inputs))
    layer = [["linear"] * 3, ["low_rank_linear", "add"], ["linear", "gelu"], ["linear", "add"]]
    assert steps(done) == layer * 6


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
    "quantize_residual{bits=4, group_size=32, rank=4}", "int8_dynamic", "low_rank{rank=4} | float8",
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
    assert named == {r.name for r in REWRITES} - {"quantize_rows"}  # rows of tables
    structured = {str(op._schema.name).split("::")[1].removesuffix("_linear") for op in HEADS & OWN}
    assert structured <= named
