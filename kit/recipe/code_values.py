"""What an expression of Python says without being run."""

import ast
from typing import Any

DEEPEST, LONGEST = 50, 10_000  # of an expression; of a text or list that is put together


class Unknown(Exception):
    """A value that only running the code would tell."""


def known(node: Any, names: dict[str, Any], default: Any = None) -> Any:
    try:
        return value_of(node, names)
    except Unknown:
        return default


def value_of(node: Any, names: dict[str, Any], depth: int = 0) -> Any:
    """A constant, list, mapping, name or plain arithmetic of them; Unknown for all that would have to be run."""
    value = _value_of(node, names, depth)
    if _size(value) > LONGEST:  # a name used twice in a value used twice …
        raise Unknown
    return value


def _size(value: Any) -> int:
    if isinstance(value, (list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return 1 + sum(map(_size, parts))
    return len(value) if isinstance(value, str) else 1


def _value_of(node: Any, names: dict[str, Any], depth: int) -> Any:
    def inner(part: Any) -> Any:
        return value_of(part, names, depth + 1)

    if depth > DEEPEST:
        raise Unknown
    match node:
        case ast.Constant(value=value) if not isinstance(value, (bytes, complex)):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return [inner(part) for part in parts]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {str(inner(key)): inner(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return _number(inner(part)) * -1
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not inner(part)
        case ast.JoinedStr(values=parts):
            return "".join(str(inner(part.value if isinstance(part, ast.FormattedValue) else part)) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = inner(left), inner(right)
            if type(first) is type(second) and isinstance(first, (str, list)):
                return first + second
            return _number(first) + _number(second)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _number(inner(left)) * _number(inner(right))
        case ast.BinOp(left=left, op=ast.Div() | ast.FloorDiv() as op, right=right) if _number(inner(right)):
            quotient = _number(inner(left)) / _number(inner(right))
            return int(quotient) if isinstance(op, ast.FloorDiv) else quotient
    raise Unknown


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e18:
        raise Unknown
    return value


def written(node: ast.expr) -> str:
    try:
        return " ".join(ast.unparse(node).split())[:80]
    except RecursionError:
        return "…"
