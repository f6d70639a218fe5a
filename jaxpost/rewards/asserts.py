"""Tests written as assert statements, split in two: calls for the sandbox, comparisons for the judge.

In `assert abs(area(3) - 28.27) < 0.01`, only `area(3)` is worked out beside the untrusted code, which tells its value
as plain data; `abs`, `-` and `<` are done here, on Python's own types.
"""

from __future__ import annotations

import ast
import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from jaxpost.rewards.tainted import Tainted, truths

MAX_LENGTH = 10**6
"""Of what `*` or `range` make."""
MAX_BITS = 10**6
"""Of a power."""
MAX_DIGITS = 1000
"""Of a rounding."""

_TYPES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}
_CONVERSIONS = ("list", "tuple", "set", "frozenset", "sorted", "dict")
"""Of an iterator they keep every item, so they may be done where it is."""
_PREDICATES = (
    "startswith", "endswith", "isdigit", "isalpha", "isalnum", "isupper", "islower", "isspace", "isnumeric",
    "isdecimal", "isidentifier", "istitle", "issubset", "issuperset", "isdisjoint",
)  # fmt: skip
"""Methods of plain data that say yes or no: an object's own would say what it likes, so they are called here."""
_JOINING = ("set", "frozenset", "math.isclose")
"""So do these of several values."""
_OPERATORS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__")
_BETWEEN = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.BitXor)
"""Of equal values these give the same whatever the values are, so they compare."""
_CONSTANTS = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "math.nan": math.nan, "math.tau": math.tau}


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_LENGTH:
        raise ValueError("a range that is too long")
    return made


def _round(number: Any, digits: int | None = None) -> Any:
    if digits is not None and abs(digits) > MAX_DIGITS:
        raise ValueError("a rounding to too many digits")
    return round(number, digits)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, list, tuple, set, frozenset, dict)},
    **{function.__name__: function for function in (abs, len, sorted, sum, min, max, any, all, repr, type)},
    **{function.__name__: function for function in (isinstance, ord, chr, reversed, enumerate, zip)},
    "range": _range,
    "round": _round,
    **{f"math.{f.__name__}": f for f in (math.isclose, math.sqrt, math.floor, math.ceil, math.fabs, math.isnan)},
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert,
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip


class Unsupported(ValueError):
    """A test whose outcome could not be judged outside of the sandbox."""


class Test(NamedTuple):
    """One test in two halves."""

    text: str
    statements: str
    """For the sandbox; `__show__` gets each value."""
    claims: tuple[ast.expr, ...]
    """For the judge; the names `__shown__0` ... stand for the values."""

    def holds(self, shown: Sequence[Any]) -> bool:
        """Whether every claim is true of these values; a comparison that raises is false."""
        values = {f"__shown__{i}": value for i, value in enumerate(shown)}
        try:
            return all(bool(_value(claim, values)) for claim in self.claims)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError, RecursionError):
            return False


@lru_cache(maxsize=4096)
def parse(text: str) -> Test:
    """Splits a test: assert statements, with imports, assignments and calls among them.

    >>> test = parse("assert abs(area(3) - 28.27) < 0.01")
    >>> test.statements, test.holds([28.274]), test.holds([28.1])
    ('__show__(area(3))', True, False)

    Raises:
      Unsupported: there is no assert; other statements, functions or operators around the calls; a comparison of two
        values of the untrusted code with one another, or by a helper (`assert close(f(1), 2)`), or before the assert
        (`ok = f(1) == 2`); an assert without a call.
    """
    try:
        return _test(text, ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError) as error:
        if isinstance(error, Unsupported):
            raise
        raise Unsupported(f"the test {text[:200]!r} is not Python: {error}") from error


@lru_cache(maxsize=512)
def parse_function(text: str, entry_point: str) -> tuple[Test, ...]:
    """The tests of a module with `def check(candidate)`, one for each assert (2107.03374).

    Raises:
      Unsupported: as `parse`, or there is no such function.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Unsupported(f"the tests are a text, but not Python: {error}") from error
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "check" and len(node.args.args) == 1:
            renamed = _Rename(node.args.args[0].arg, entry_point)
            return tuple(_tests_of([renamed.visit(statement) for statement in node.body]))
    raise Unsupported("the tests are a text, but define no check(candidate)")


def _tests_of(body: Sequence[ast.stmt]) -> Iterator[Test]:
    """One test for each assert, after all that stands before it; texts, `pass` and `assert True` are none."""
    before: list[ast.stmt] = []
    for statement in body:
        says = statement.test if isinstance(statement, ast.Assert) else getattr(statement, "value", None)
        if isinstance(statement, ast.Pass) or isinstance(says, ast.Constant):
            continue
        if isinstance(statement, ast.Assert):
            yield _test(ast.unparse(statement), [*before, statement])
        else:
            before.append(statement)
    if before:
        _statement(ast.unparse(before[-1]), before[-1])  # nothing that cannot be judged is passed over


class _Rename(ast.NodeTransformer):
    def __init__(self, old: str, new: str):
        self.old, self.new = old, ast.parse(new, mode="eval").body

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.new) if node.id == self.old else node


def _test(text: str, body: Sequence[ast.stmt]) -> Test:
    splitter, lines, claims, tainted = _Splitter(text), [], [], Tainted()
    for statement in body:
        if not isinstance(statement, ast.Assert):
            lines.append(_statement(text, statement))
            if joined := tainted.statement(statement):
                raise splitter.unsupported(joined)
            continue
        if told := [truth for truth in truths(statement.test) if not _judged(truth) and tainted.compares(truth)]:
            raise splitter.unsupported(told[0])
        before = len(splitter.calls)
        claims.append(splitter.claim(statement.test))
        lines += [f"__show__({ast.unparse(call)})" for call in splitter.calls[before:]]
    if not claims:
        raise Unsupported(f"the test {text[:200]!r} has no assert")
    return Test(text, "\n".join(lines), tuple(claims))


def _statement(text: str, statement: ast.stmt) -> str:
    """What may stand among the asserts, for the sandbox."""
    if isinstance(statement, ast.Import | ast.ImportFrom | ast.Assign | ast.AugAssign | ast.Expr):
        return ast.unparse(statement)
    raise _Splitter(text).unsupported(statement)


class _Splitter:
    """Replaces the calls of the program in an expression by names of values."""

    def __init__(self, text: str):
        self.text = text
        self.calls: list[ast.expr] = []
        self.own_functions: frozenset[str] = frozenset()
        """Names of Python that the program gives a meaning of its own."""

    def unsupported(self, node: ast.AST) -> Unsupported:
        return Unsupported(
            f"the test {self.text[:200]!r} cannot be judged outside of the sandbox because of "
            f"{ast.unparse(node)[:80]!r}; write it as assert f(arguments) == literal"
        )

    def shown(self, node: ast.expr) -> ast.expr:
        self.calls.append(node)
        return ast.Name(f"__shown__{len(self.calls) - 1}", ast.Load())

    def claim(self, node: ast.expr) -> ast.expr:
        """The judge's half of an assert, which must call the program; by a function of Python's name if by no other."""
        before = len(self.calls)
        claim = self.split(node)
        if len(self.calls) == before:
            called = {_dotted(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
            self.own_functions = frozenset(called)
            claim = self.split(node)
            self.own_functions = frozenset()
        if len(self.calls) == before:
            raise Unsupported(f"the test {self.text[:200]!r} has an assert that calls nothing of the program")
        return claim

    def split(self, node: ast.expr) -> ast.expr:
        """The judge's half."""
        if isinstance(node, ast.Constant) or _dotted(node) in (*_CONSTANTS, *_TYPES):
            return node
        if isinstance(node, ast.Call):
            return self.call(node)
        if _root(node) is not None:
            return self.shown(node)
        if isinstance(node, ast.Compare):
            return self.compare(node)
        if isinstance(node, ast.BoolOp):
            return ast.BoolOp(node.op, [self.split(value) for value in node.values])
        if isinstance(node, ast.UnaryOp):
            return ast.UnaryOp(node.op, self.split(node.operand))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (*_BINARY, ast.Mult, ast.Mod, ast.Pow)):
            left, right = self.apart(node, [node.left, node.right], most=1 if isinstance(node.op, _BETWEEN) else 2)
            return ast.BinOp(left, node.op, right)
        if isinstance(node, ast.List | ast.Tuple):
            return type(node)([self.split(item) for item in node.elts])
        if isinstance(node, ast.Set):
            return ast.Set(self.apart(node, node.elts))
        if isinstance(node, ast.Dict) and None not in node.keys:
            keys: list[ast.expr | None] = [self.split(key) for key in node.keys if key is not None]
            return ast.Dict(keys, [self.split(value) for value in node.values])
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.UnaryOp):
            return ast.Subscript(self.split(node.value), self.split(node.slice), ast.Load())
        raise self.unsupported(node)

    def apart(self, node: ast.expr, parts: Sequence[ast.expr], *, most: int = 1) -> list[ast.expr]:
        """Their halves, where few of them may be the program's: it could make them equal without knowing either."""
        halves, own = [], 0
        for part in parts:
            before = len(self.calls)
            halves.append(self.split(part))
            own += len(self.calls) > before
        if own > most:
            raise self.unsupported(node)
        return halves

    def compare(self, node: ast.Compare) -> ast.expr:
        sides = []
        for side in (node.left, *node.comparators):
            before = len(self.calls)
            sides.append((self.split(side), len(self.calls) > before))
        for (_, left), (_, right) in pairwise(sides):
            if left and right:  # the program could make them equal without knowing either
                raise self.unsupported(node)
        for op, side in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.Is | ast.IsNot) and not (
                isinstance(side, ast.Constant) and (side.value is None or isinstance(side.value, bool))
            ):
                raise self.unsupported(node)
        return ast.Compare(sides[0][0], node.ops, [side for side, _ in sides[1:]])

    def call(self, node: ast.Call) -> ast.expr:
        name, before = _dotted(node.func), len(self.calls)
        if name in self.own_functions:
            return self.shown(node)
        if name in _FUNCTIONS:
            if name in _CONVERSIONS and len(node.args) == 1 and not node.keywords and self.own(node.args[0]):
                return self.shown(node)
            call = ast.Call(node.func, *self.arguments(node))
            if name in _JOINING and len(self.calls) > before + 1:
                raise self.unsupported(node)
            return call
        if isinstance(node.func, ast.Attribute) and node.func.attr in _PREDICATES:
            value = self.split(node.func.value)
            call = ast.Call(ast.Attribute(value, node.func.attr, ast.Load()), *self.arguments(node))
            if len(self.calls) > before + 1:
                raise self.unsupported(node)
            return call
        if isinstance(node.func, ast.Attribute) and node.func.attr in _OPERATORS:
            raise self.unsupported(node)
        if _root(node) is not None:
            return self.shown(node)
        raise self.unsupported(node)

    def own(self, node: ast.expr) -> bool:
        """Whether it is the program's own value as it is."""
        return _dotted(node) not in _CONSTANTS and _root(node) is not None

    def arguments(self, node: ast.Call) -> tuple[list[ast.expr], list[ast.keyword]]:
        if any(keyword.arg is None for keyword in node.keywords):
            raise self.unsupported(node)
        keywords = [ast.keyword(keyword.arg, self.split(keyword.value)) for keyword in node.keywords]
        return [self.split(argument) for argument in node.args], keywords


def _judged(node: ast.expr) -> bool:
    """Whether it is worked out here, not beside the program."""
    func = node.func if isinstance(node, ast.Call) else node
    return _dotted(func) in _FUNCTIONS or (isinstance(func, ast.Attribute) and func.attr in _PREDICATES)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _root(node: ast.expr) -> str | None:
    """The name of the program at the beginning of a chain of calls, attributes and items; None if there is none."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    known = isinstance(node, ast.Name) and (node.id in _FUNCTIONS or node.id in _TYPES or node.id == "math")
    return node.id if isinstance(node, ast.Name) and not known else None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a judge's half, over plain data."""
    if isinstance(node, ast.Constant):
        return node.value
    if (name := _dotted(node)) in values:
        return values[name]
    if name in _CONSTANTS or name in _TYPES:
        return _CONSTANTS.get(name, _TYPES.get(name))
    if isinstance(node, ast.Compare):
        return _compared(node, values)
    if isinstance(node, ast.BoolOp):
        every = [bool(_value(value, values)) for value in node.values]
        return all(every) if isinstance(node.op, ast.And) else any(every)
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_value(node.operand, values))
    if isinstance(node, ast.BinOp):
        return _arithmetic(node.op, _value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [_value(item, values) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items) if isinstance(node, ast.Tuple) else set(items)
    if isinstance(node, ast.Dict):
        keys = [_value(key, values) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(value, values) for value in node.values), strict=True))
    if isinstance(node, ast.Subscript):
        return _value(node.value, values)[_value(node.slice, values)]
    if isinstance(node, ast.Call):
        arguments = [_value(argument, values) for argument in node.args]
        keywords = {keyword.arg: _value(keyword.value, values) for keyword in node.keywords if keyword.arg}
        if (name := _dotted(node.func)) in _FUNCTIONS:
            return _FUNCTIONS[name](*arguments, **keywords)
        if isinstance(node.func, ast.Attribute):
            return getattr(_value(node.func.value, values), node.func.attr)(*arguments, **keywords)
    raise TypeError(f"{ast.unparse(node)} has no value")


def _compared(node: ast.Compare, values: Mapping[str, Any]) -> bool:
    sides = [_value(side, values) for side in (node.left, *node.comparators)]
    pairs = zip(node.ops, sides[:-1], sides[1:], strict=True)
    return all(bool(_COMPARE[type(op)](left, right)) for op, left, right in pairs)


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """An operator whose result cannot be enormous."""
    numbers = (int, float, complex)
    if isinstance(op, ast.Mult):
        for items, count in ((left, right), (right, left)):
            if not isinstance(items, numbers) and isinstance(count, int) and len(items) * count > MAX_LENGTH:
                raise ValueError("a product that is too long")
        return left * right
    if isinstance(op, ast.Mod):
        if not isinstance(left, numbers):
            raise TypeError("% is for numbers")
        return left % right
    if isinstance(op, ast.Pow):
        if abs(right) * (left.bit_length() if isinstance(left, int) else 1) > MAX_BITS:
            raise ValueError("a power that is too large")
        return left**right
    return _BINARY[type(op)](left, right)
