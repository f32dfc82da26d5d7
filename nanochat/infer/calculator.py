"""The calculator of the chat format: what stands between <|python_start|> and <|python_end|> is evaluated here.

Arithmetic on numbers and the counting of letters in a word, nothing else: the text comes from a model. It is parsed, and
the tree is walked with a list of what is allowed; no `eval`, no names, no attribute but `count`.
"""

import ast
import math
import operator
from collections.abc import Callable

MAX_CHARACTERS = 200
MAX_DIGITS = 100  # of any intermediate result: `9**9**9` must not take a minute
MAX_NODES = 100

BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Refused(ValueError):
    """The expression is not one of the calculator's."""


def calculate(expression: str) -> str | None:
    """The value as text, or None when it is no arithmetic, too long or undefined (a division by zero)."""
    expression = expression.strip().replace(",", "") if "'" not in expression and '"' not in expression else expression
    if not expression or len(expression) > MAX_CHARACTERS:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            return None
        return _text(_value(tree.body))
    except (Refused, SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=bool()):
            raise Refused
        case ast.Constant(value=int() | float()):
            return _bounded(node.value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as word), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return word.count(part)
    raise Refused


def _power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent where it is a real number of at most MAX_DIGITS digits."""
    if abs(base) > 1 and abs(exponent) * math.log10(abs(base)) > MAX_DIGITS + 1:
        raise Refused
    value = base**exponent
    if isinstance(value, complex):
        raise Refused
    return _bounded(value)


def _bounded(value: int | float) -> int | float:
    # `not <=` refuses NaN too.
    if not abs(value) <= 10**MAX_DIGITS:
        raise Refused
    return value


def _text(value: int | float) -> str:
    """17, 0.5, 3.333333: as short as it is right to seven digits."""
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.7g}"
    return str(value)
