"""Fusion of random programs: products of one input, pointwise calls on them, writes in place, any of them returned."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.codegen.spec import op_of
from fxcompress.core.metric import Metric
from fxcompress.core.signature import SignedModule
from fxcompress.passes.fuse import FUSED, OWN, fuse
from fxcompress.passes.quantize import Quantize
from tests.fusing import calls, same, steps

aten = torch.ops.aten


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
