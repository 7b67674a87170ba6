"""Formulas, module names and which lines are one."""

import pytest
import sympy
import torch
from torch import nn

from fxcompress.codegen.costs import cost_of
from fxcompress.core.cost import Cost
from fxcompress.cost_model.cost_table import brief, formula, merged, number, ranges
from fxcompress.passes.fuse import fuse
from tests.costing import captured
from tests.fusing import rewritten

S0, S1 = sympy.symbols("s0 s1", positive=True, integer=True)


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (0, "0"),
        (1_179_648, "1.18M"),
        (S0, "s0"),
        (2 * 384 * S0 * S1, "768 s0 s1"),
        (384 * S0 * S1 + 12 * S0, "s0 (384 s1 + 12)"),
        (4 * S0 * S1**2 + 20_000 * S0 * S1, "s0 s1 (4 s1 + 20K)"),
        (5000 * S0 * S1 + 50 * S0 + 50 * S1**2 + 50, "s1 (5000 s0 + 50 s1)"),
        (S0 * (S1 - 2) + 7, "s0 (s1 - 2) + 7"),
        (S0 * S1 + S0 + 5_000_000, "s0 (s1 + 1) + 5M"),
        (S0 * sympy.floor((S1 - 1) / 2) * 8, "8 floor(s1/2 - 1/2) s0"),
        (sympy.Piecewise((8 * S0, sympy.Le(8 * S0, 100 + 2 * S0)), (100 + 2 * S0, True)),
         "(8 s0 if s0 <= 16 else 2 s0 + 100)"),
    ],
)  # fmt: skip
def test_formulas_are_short(expr, text):
    assert formula(expr) == text


def test_numbers_have_three_digits():
    assert [number(n) for n in (0, 7, 9999, 10_000, 999_600, 1_234_567, 2.5e12)] == [
        "0", "7", "9999", "10K", "1000K", "1.23M", "2.5T",
    ]  # fmt: skip


def test_modules_of_one_cost_are_one_line():
    cost, other = Cost(S0, S0, 4, 1), Cost(2 * S0, S0, 4, 1)
    rows = [*((f"layer.{i}.up", other if i == 3 else cost) for i in range(6)), ("", cost)]
    lines = merged(rows)
    assert [line.label for line in lines] == ["layer.0-2,4-5.up", "layer.3.up", "(the model itself)"]
    assert lines[0].total == Cost(5 * S0, 5 * S0, 20, 5)


def test_names_are_told_once():
    assert brief("a.b.q, a.b.k") == "a.b.{q, k}"
    assert (brief("q, k"), brief("q")) == ("{q, k}", "q")
    assert ranges((5, 0, 1, 2)) == "0-2,5"


def test_a_graph_without_notes_of_tracing_finds_its_modules():
    gm = captured("llama")
    told = {of.node: of.module for of in cost_of(gm).nodes}
    bare = gm.copy()
    for node in bare.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    found = {of.node: of.module for of in cost_of(bare).nodes}
    assert found.keys() == told.keys()
    assert all(told[node].startswith(module) for node, module in found.items())
    products = [node for node in found if node.startswith(("linear", "scaled"))]
    assert [found[node] for node in products] == [told[node] for node in products]


def test_the_table_of_a_tensor_train_says_when_which_way_is_taken(golden):
    torch.manual_seed(0)
    gm = rewritten(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (torch.randn(4, 64),), "tensor_train{rank=4}")
    golden(str(cost_of(fuse(gm))))


def test_the_table_of_a_convolutional_net(golden):
    golden(str(cost_of(captured("convolutions"))))
