"""Formulas as data: their syntax trees, the order to compute them in, and the program that computes them.

A formula is a method of a rule: a pure function of the quantities that its parameters name. `Program` is several
of them as one function, a line for each quantity, in the author's own words:

    def backward(input, mean, rstd, weight, axes, grad):
        xhat = (input - mean) * rstd
        h = grad * weight
        grad_input = rstd * (h - h.mean(axes, True) - xhat * (h * xhat).mean(axes, True))
        return (grad_input, None, None)

A method with statements other than assignments (a loop, say) stays a function, and the program calls it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Formula:
    """``target = function(*names)``"""

    target: str
    function: Callable[..., Any]
    names: tuple[str, ...]

    @classmethod
    def of(cls, target: str, function: Callable[..., Any]) -> Formula:
        return cls(target, function, tuple(inspect.signature(function).parameters))

    @property
    def tree(self) -> ast.FunctionDef | None:
        """The syntax tree, None if there is no source (as of what ``exec`` has defined)."""
        return tree_of(self.function)

    def place(self, line: int | None = None) -> str:
        """The method, and where it is."""
        code = self.function.__code__
        return f'{self.function.__qualname__} (file "{code.co_filename}", line {line or code.co_firstlineno})'

    @cached_property
    def statements(self) -> list[ast.Assign] | None:
        """The body as assignments, the last one to the target; None if it holds anything else."""
        tree = self.tree
        if tree is None or self.names != tuple(arg.arg for arg in tree.args.args):
            return None
        body = [x for x in tree.body if not is_docstring(x)]
        if not body or not isinstance(body[-1], ast.Return) or body[-1].value is None:
            return None
        found = []
        for statement in body[:-1]:
            match statement:
                case ast.Assign(targets=[target]) if _is_plain(target):
                    found.append(statement)
                case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value):
                    found.append(ast.copy_location(ast.Assign([target], value), statement))
                case _:
                    return None
        result = ast.Assign([ast.Name(self.target, ast.Store())], body[-1].value)
        found.append(ast.copy_location(result, body[-1]))
        parameters = set(self.names)
        if any(_has(x, ast.NamedExpr, ast.Await, ast.Yield) for x in found) or parameters & _assigned(found):
            return None
        return found


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_plain(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple):
        return all(map(_is_plain, target.elts))
    return isinstance(target, ast.Name | ast.Starred)


def _has(node: ast.AST, *kinds: type[ast.AST]) -> bool:
    return any(isinstance(x, kinds) for x in ast.walk(node))


def _assigned(statements: Iterable[ast.Assign]) -> set[str]:
    """Names that are bound before the last statement, which binds the target."""
    targets = [x.targets[0] for x in [*statements][:-1]]
    return {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}


@cache
def _functions_in(path: str) -> Mapping[int, ast.FunctionDef]:
    """The functions of a source file by their first line."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return {}
    found = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    return {min([x.lineno, *(d.lineno for d in x.decorator_list)]): x for x in found}


def tree_of(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function, None if there is no source."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    tree = _functions_in(code.co_filename).get(code.co_firstlineno)
    return tree if tree is not None and tree.name == code.co_name else None


def topological_order(
    formulas: Mapping[str, Formula], targets: Iterable[str], given: frozenset[str]
) -> list[Formula]:
    """The formulas that compute the targets from the given quantities, each after those that it names.

    Raises:
        TypeError: a formula needs itself.
    """
    order: dict[str, Formula] = {}
    open_: list[str] = []

    def visit(name: str) -> None:
        if name in given or name in order:
            return
        if name in open_:
            raise TypeError(f"{' -> '.join([*open_[open_.index(name) :], name])} is a circle")
        open_.append(name)
        for needed in formulas[name].names:
            visit(needed)
        open_.pop()
        order[name] = formulas[name]

    for target in targets:
        visit(target)
    return list(order.values())


@dataclass(frozen=True)
class Line:
    """A statement of a program, and where its author wrote it."""

    statement: ast.Assign
    formula: Formula
    lineno: int

    @property
    def place(self) -> str:
        return self.formula.place(self.lineno)


class Program:
    """Formulas as the lines of one function.

    Args:
        formulas: in the order to compute them.
        names: the parameters of the function.
        results: the names that it returns, None for those that no formula computes.
    """

    def __init__(
        self, name: str, formulas: Sequence[Formula], names: Sequence[str], results: Sequence[str]
    ) -> None:
        self.name = name
        self.parameters = tuple(names)
        computed = {formula.target for formula in formulas}
        self.results = tuple(name if name in computed else None for name in results)
        self.scope: dict[str, Any] = {}
        """The global names that the lines read."""
        self._taken = {*names, *computed}
        self.lines = [line for formula in formulas for line in self._lines_of(formula)]

    def _lines_of(self, formula: Formula) -> list[Line]:
        if formula.statements is None:
            return [self._call(formula)]
        names = self._new_names(formula)
        if names is None:
            return [self._call(formula)]
        lines = [Line(_Rename(names).visit(deepcopy(x)), formula, x.lineno) for x in formula.statements]
        lines[-1].statement.targets = [ast.Name(formula.target, ast.Store())]  # even if a local name is the same
        return lines

    def _new_names(self, formula: Formula) -> dict[str, str] | None:
        """What the formula's local and global names are called in the program; None if one is not to be found."""
        statements = formula.statements
        assert statements is not None
        local = _assigned(statements)
        names = {name: self._free(name) for name in sorted(local)}
        inner = {name for x in statements for name in _bound_inside(x.value)}
        read = {x.id for statement in statements for x in ast.walk(statement.value) if isinstance(x, ast.Name)}
        for name in sorted(read - local - set(formula.names) - inner):
            try:
                value = _global(formula.function, name)
            except (NameError, ValueError):  # not there, or not yet bound
                return None
            names[name] = self._enter(name, value)
        return names

    def _enter(self, name: str, value: Any) -> str:
        """Make a value of the author's module known to the program."""
        if name not in self.scope and name not in self._taken:
            self.scope[name] = value
        elif self.scope.get(name) is not value:
            name = self._free(name)
            self.scope[name] = value
        return name

    def _free(self, name: str) -> str:
        found, n = name, 1
        while found in self._taken or found in self.scope:
            n += 1
            found = f"{name}_{n}"
        self._taken.add(found)
        return found

    def _call(self, formula: Formula) -> Line:
        owner = getattr(formula.function, "__qualname__", "").rpartition(".")[0].rpartition(".")[2]
        name = self._enter(
            f"{owner}_{formula.target}" if owner.isidentifier() else f"_{formula.target}", formula.function
        )
        args: list[ast.expr] = [ast.Name(x, ast.Load()) for x in formula.names]
        target: list[ast.expr] = [ast.Name(formula.target, ast.Store())]
        code = getattr(formula.function, "__code__", None)
        lineno = 0 if code is None else code.co_firstlineno
        return Line(ast.Assign(target, ast.Call(ast.Name(name, ast.Load()), args, [])), formula, lineno)

    @property
    def places(self) -> list[str]:
        """Where the author wrote each line."""
        return [line.place for line in self.lines]

    @property
    def source(self) -> str:
        """The program as text."""
        return self.text([ast.unparse(ast.fix_missing_locations(line.statement)) for line in self.lines])

    def text(self, lines: Iterable[str]) -> str:
        """The function of these lines, with the parameters and the results of the program."""
        head = f"def {self.name}({', '.join(self.parameters)}):"
        end = f"return ({', '.join(map(str, self.results))}{',' if len(self.results) == 1 else ''})"
        return "\n".join([head, *(f"    {x}" for x in (*lines, end)), ""])

    def compiled(self) -> Callable[..., tuple[Any, ...]]:
        return compile_source(self.source, self.name, self.scope, self.places)


_places: dict[str, Sequence[str]] = {}
"""For each program that was compiled: where the author wrote each of its lines."""


def compile_source(
    source: str, name: str, scope: Mapping[str, Any], places: Sequence[str]
) -> Callable[..., tuple[Any, ...]]:
    """The function that a text defines, a line for each of the places after the line of ``def``."""
    path = f"<{name} {len(_places)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    _places[path] = places
    inside = dict(scope)
    exec(compile(source, path, "exec"), inside)
    return inside[name]


def note_place(error: BaseException) -> None:
    """Add to an error that a program raised where the author wrote the line."""
    traceback = error.__traceback__
    while traceback is not None:
        places = _places.get(traceback.tb_frame.f_code.co_filename, ())
        line = traceback.tb_lineno - 2
        if 0 <= line < len(places):
            error.add_note(f"in the formula {places[line]}")
        traceback = traceback.tb_next


class _Rename(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _bound_inside(node: ast.AST) -> set[str]:
    """Names that comprehensions and lambdas inside an expression bind."""
    found = set()
    for x in ast.walk(node):
        if isinstance(x, ast.comprehension):
            found |= {y.id for y in ast.walk(x.target) if isinstance(y, ast.Name)}
        elif isinstance(x, ast.Lambda):
            found |= {arg.arg for arg in ast.walk(x.args) if isinstance(arg, ast.arg)}
    return found


def _global(function: Any, name: str) -> Any:
    """What a name means in a function that does not bind it."""
    code = function.__code__
    if name in code.co_freevars:
        return function.__closure__[code.co_freevars.index(name)].cell_contents
    if name in function.__globals__:
        return function.__globals__[name]
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise NameError(name)
