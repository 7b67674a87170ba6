"""Counts of work, in the graph's own symbols (batch, sequence). Nothing here knows a device.

    flops         multiply and add count as two
    bytes         memory traffic: each operand read once, the result written once
    weight_bytes  stored bytes of the weight, the part of `bytes` that does not grow with the batch; a plain int
    launches      kernels started
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy


@dataclass(frozen=True)
class Cost:
    """Work of one node. Costs of consecutive nodes add."""

    flops: sympy.Expr
    bytes: sympy.Expr
    weight_bytes: int
    launches: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.weight_bytes + other.weight_bytes,
            self.launches + other.launches,
        )

    def at(self, **symbols: int) -> Cost:
        """The counts with `symbols` (by name) replaced: `cost.at(s0=8, s1=128)`. Unknown names are left alone."""
        values = {sympy.Symbol(name): value for name, value in symbols.items()}

        def put(expr: sympy.Expr) -> sympy.Expr:
            by_name = {s: values[sympy.Symbol(s.name)] for s in expr.free_symbols if sympy.Symbol(s.name) in values}
            return expr.xreplace({s: sympy.Integer(v) for s, v in by_name.items()})

        return Cost(put(sympy.sympify(self.flops)), put(sympy.sympify(self.bytes)), self.weight_bytes, self.launches)


ZERO = Cost(sympy.Integer(0), sympy.Integer(0), 0, 0)


def linear_cost(tokens: sympy.Expr, out_features: int, in_features: int, weight_bytes: int, itemsize: int) -> Cost:
    """y (tokens, out) = x (tokens, in) W^T with W kept in `weight_bytes`."""
    traffic = tokens * (in_features + out_features) * itemsize + weight_bytes
    return Cost(2 * tokens * out_features * in_features, traffic, weight_bytes)
