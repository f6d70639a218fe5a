"""Which values of a test are the untrusted program's, and where a test would join them with others beside it.

In `ok = f(2) == 4` the program's own `__eq__` decides, or a subtraction of its own in `d = f(2) - 4`: what is shown of
`ok` proves nothing. So the sandbox's half of a test may hold such values and hand them on, but not work with them.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable
from functools import lru_cache

_BUILTINS = frozenset(dir(builtins))
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Tainted:
    """Follows a test's statements; every name is the program's but Python's own, and those of plain values."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        """Of the standard library, with what is imported from them."""
        self.plain: set[str] = set()
        self.made: set[str] = set()
        """Names to which the test has given values of the program."""

    def holds(self, node: ast.AST) -> bool:
        """Whether a value of the program takes part."""
        known = self.modules | self.plain | _BUILTINS
        known |= {argument.arg for n in ast.walk(node) if isinstance(n, ast.Lambda) for argument in n.args.args}
        return any(isinstance(n, ast.Name) and n.id not in known for n in ast.walk(node))

    def statement(self, node: ast.stmt) -> ast.AST | None:
        """Takes note of a statement; gives the part of it that joins values, if any."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._imported(node)
            return None
        if isinstance(node, ast.Expr):
            call, targets = node.value, []
            # What becomes of a bare call is shown by nothing: only its arguments count, and whom they were given to.
            parts: Iterable[ast.expr] = _arguments(call) if isinstance(call, ast.Call) else [call]
            found = next(filter(None, map(self.joined, parts)), None)
            if isinstance(call, ast.Call) and any(map(self.holds, parts)):
                targets = [call.func]
        elif isinstance(node, ast.Assign):
            targets, found = node.targets, self.joined(node.value)
        elif isinstance(node, ast.AugAssign):
            own = self.holds(node.value) or (isinstance(node.target, ast.Name) and self.holds(node.target))
            targets, found = [node.target], node if own else None
        else:
            return None
        for target in targets:
            self._assign(target, own=self.holds(node if isinstance(node, ast.Expr) else node.value))
        self._lent(node)
        return found

    def joined(self, node: ast.AST) -> ast.AST | None:
        """The first part in which an operator or a helper joins a value of the program with another."""
        if isinstance(node, ast.Lambda) or not self.holds(node):
            return None
        if isinstance(node, ast.Call):
            return self._joined_by(node)
        if isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.IfExp | ast.NamedExpr):
            return node
        if isinstance(node, ast.Subscript) and self.holds(node.slice):
            return node
        if isinstance(node, _COMPREHENSIONS):
            before = set(self.plain)
            for part in node.generators:
                self._assign(part.target, own=self.holds(part.iter))
            found = next(filter(None, map(self.joined, ast.iter_child_nodes(node))), None)
            self.plain = before
            return found
        return next(filter(None, map(self.joined, ast.iter_child_nodes(node))), None)

    def _joined_by(self, call: ast.Call) -> ast.AST | None:
        """A call of the program is its word as a whole; a helper gets one of its values alone, as in len(f(2))."""
        if self.holds(call.func):
            return None
        arguments = _arguments(call)
        helper = root(call.func)
        if len(arguments) > 1 or helper not in self.modules | _BUILTINS or isinstance(call.func, ast.Call):
            return call
        return self.joined(arguments[0])

    def compares(self, truth: ast.expr) -> bool:
        """Whether a truth is told by a helper that gets a value of the program and something beside it."""
        if not isinstance(truth, ast.Call) or not isinstance(truth.func, ast.Name | ast.Attribute):
            return False
        chain = truth.func.value if isinstance(truth.func, ast.Attribute) else truth.func
        if not isinstance(chain, ast.Name) or (chain.id in self.made and truth.func is not chain):
            return False  # a method of what the program made
        arguments = _arguments(truth)
        return len(arguments) > 1 and any(self._made(n) for a in arguments for n in ast.walk(a))

    def _made(self, node: ast.AST) -> bool:
        """Whether it is the program's result; its objects, by the custom of capital letters, are rather arguments."""
        if isinstance(node, ast.Call):
            return self.holds(node.func) and not (root(node.func) or "").lstrip("_")[:1].isupper()
        return isinstance(node, ast.Name) and node.id in self.made

    def _imported(self, node: ast.Import | ast.ImportFrom) -> None:
        for one in node.names:
            package = node.module if isinstance(node, ast.ImportFrom) else one.name
            name = one.asname or one.name.partition(".")[0]
            if (package or "").partition(".")[0] in sys.stdlib_module_names:
                self.modules.add(name)

    def _assign(self, target: ast.expr, *, own: bool) -> None:
        if isinstance(target, ast.Name):
            (self.plain.discard if own else self.plain.add)(target.id)
            (self.made.add if own else self.made.discard)(target.id)
        elif isinstance(target, ast.Tuple | ast.List | ast.Starred):
            for part in ast.iter_child_nodes(target):
                if isinstance(part, ast.expr):
                    self._assign(part, own=own)
        elif own and (name := root(target)) is not None:
            self._assign(ast.Name(name), own=True)

    def _lent(self, node: ast.AST) -> None:
        """What the program gets it may change."""
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and self.holds(call.func):
                for name in (n for a in _arguments(call) for n in ast.walk(a) if isinstance(n, ast.Name)):
                    self.plain.discard(name.id)


def vouched(text: str, setup: str) -> ast.AST | None:
    """The first truth of a test that a function of its setup alone tells of what the program gives.

    The program could put a function of its own in that one's place, which says yes to all.
    """
    helpers, tainted = _defined(setup), Tainted()
    for statement in ast.parse(text).body if helpers else []:
        if not isinstance(statement, ast.Assert):
            tainted.statement(statement)
            continue
        for truth in truths(statement.test):
            if not isinstance(truth, ast.Call) or root(truth.func) not in helpers:
                continue
            given = [n for argument in _arguments(truth) for n in ast.walk(argument)]
            called = {root(n.func) for n in given if isinstance(n, ast.Call) and tainted.holds(n.func)}
            if called - helpers or any(isinstance(n, ast.Name) and n.id in tainted.made for n in given):
                return truth
    return None


@lru_cache(maxsize=512)
def _defined(setup: str) -> frozenset[str]:
    """The functions that a module's text defines."""
    try:
        body = ast.parse(setup).body
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()  # the program cannot be loaded either
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def root(node: ast.expr) -> str | None:
    """The name at the beginning of a chain of calls, attributes and items, if it is one."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def truths(node: ast.expr) -> list[ast.expr]:
    """The expressions whose truth alone an assert reads."""
    if isinstance(node, ast.BoolOp):
        return [truth for value in node.values for truth in truths(value)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return truths(node.operand)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        told = [side for side in sides if not (isinstance(side, ast.Constant) and isinstance(side.value, bool))]
        return [truth for side in told for truth in truths(side)] if len(told) < len(sides) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bool":
        return [truth for argument in node.args for truth in truths(argument)]
    return [node]
