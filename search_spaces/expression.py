"""Arithmetic in search spaces: `= round(0.5 * n_layer)`, `decay < 1 and n_layers > 1`.

Numbers, names, + - * / // % **, comparisons, and/or/not, `a if test else b`, and round, int, min, max, log2, abs.
Nothing else is computed, so a space file cannot run code.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from statespan.errors import UserError, unknown

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "round": round,
    "int": int,
    "min": min,
    "max": max,
    "abs": abs,
    "log2": math.log2,
}


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression. Raises UserError for a name that is not there or anything but arithmetic."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, names)
    except UserError:
        raise
    except (SyntaxError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"search space: {text.strip()!r} cannot be computed: {error}") from error


def names_in(text: str) -> set[str]:
    """Names an expression reads."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UserError(f"search space: {text.strip()!r} is no expression: {error}") from error
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - _FUNCTIONS.keys()


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value) if isinstance(value, int | float | str):
            return value
        case ast.Name(id=name):
            if name not in names:
                raise unknown("value in a search space", name, names)
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(one, names) for one in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(one, names) for one in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
            values = [_value(one, names) for one in (left, *comparators)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(one, names) for one in args))
    raise UserError(f"search space: {ast.unparse(node)!r} is not arithmetic")
