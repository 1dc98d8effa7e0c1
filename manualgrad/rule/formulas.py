"""Formulas as data: their syntax trees, their order, and the program that computes them.

A formula is a method of a rule: a pure function of the quantities that its parameters name. `Program` joins
several formulas into one function. It inlines their statements, so each quantity gets a line in the author's own
notation:

    def backward(input, mean, rstd, weight, axes, grad):
        xhat = (input - mean) * rstd
        h = grad * weight
        grad_input = rstd * (h - h.mean(axes, True) - xhat * (h * xhat).mean(axes, True))
        return (grad_input, None, None)

A method with other statements than assignments (a loop, for example) is not inlined. The program calls it.
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
    """``target = function(*parameters)``"""

    target: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]

    @classmethod
    def from_function(cls, target: str, function: Callable[..., Any]) -> Formula:
        return cls(target, function, tuple(inspect.signature(function).parameters))

    @property
    def tree(self) -> ast.FunctionDef | None:
        """The syntax tree. None if there is no source, for example for a function that ``exec`` defined."""
        return syntax_tree(self.function)

    def location(self, line: int | None = None) -> str:
        """The name of the method, its file and its line."""
        code = self.function.__code__
        return f'{self.function.__qualname__} (file "{code.co_filename}", line {line or code.co_firstlineno})'

    @cached_property
    def statements(self) -> list[ast.Assign] | None:
        """The body as assignments, the last of them to the target. None if it has other statements."""
        tree = self.tree
        if tree is None or self.parameters != tuple(arg.arg for arg in tree.args.args):  # for example ``*args``
            return None
        body = [x for x in tree.body if not is_docstring(x)]
        if not body or not isinstance(body[-1], ast.Return) or body[-1].value is None:
            return None
        found = []
        for statement in body[:-1]:
            match statement:
                case ast.Assign(targets=[target]) if _is_name_or_tuple(target):
                    found.append(statement)
                case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value):
                    found.append(ast.copy_location(ast.Assign([target], value), statement))
                case _:
                    return None
        result = ast.Assign([ast.Name(self.target, ast.Store())], body[-1].value)
        found.append(ast.copy_location(result, body[-1]))
        rebinds_parameters = not _local_names(found).isdisjoint(self.parameters)
        if rebinds_parameters or any(_contains(x, ast.NamedExpr, ast.Await, ast.Yield) for x in found):
            return None
        return found


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_name_or_tuple(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple):
        return all(map(_is_name_or_tuple, target.elts))
    return isinstance(target, ast.Name | ast.Starred)


def _contains(node: ast.AST, *kinds: type[ast.AST]) -> bool:
    return any(isinstance(x, kinds) for x in ast.walk(node))


def _local_names(statements: Iterable[ast.Assign]) -> set[str]:
    """The names that all statements but the last bind. (The last binds the target.)"""
    targets = [x.targets[0] for x in [*statements][:-1]]
    return {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}


@cache
def _functions_by_line(path: str) -> Mapping[int, ast.FunctionDef]:
    """The functions of a source file, by their first line: that of the first decorator, if there is one."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return {}
    found = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    return {min([x.lineno, *(d.lineno for d in x.decorator_list)]): x for x in found}


def syntax_tree(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function. None if there is no source."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    tree = _functions_by_line(code.co_filename).get(code.co_firstlineno)
    return tree if tree is not None and tree.name == code.co_name else None  # another name: the file has changed


def topological_order(
    formulas: Mapping[str, Formula], targets: Iterable[str], available: frozenset[str]
) -> list[Formula]:
    """The formulas that compute the targets from the available quantities, each after those that it depends on.

    Raises:
        TypeError: a formula depends on itself.
    """
    order: dict[str, Formula] = {}
    visiting: list[str] = []

    def visit(name: str) -> None:
        if name in available or name in order:
            return
        if name in visiting:
            raise TypeError(f"circular definition: {' -> '.join([*visiting[visiting.index(name) :], name])}")
        visiting.append(name)
        for parameter in formulas[name].parameters:
            visit(parameter)
        visiting.pop()
        order[name] = formulas[name]

    for target in targets:
        visit(target)
    return list(order.values())


@dataclass(frozen=True)
class Line:
    """A statement of a program and the source line that it comes from."""

    statement: ast.Assign
    formula: Formula
    lineno: int

    @property
    def location(self) -> str:
        return self.formula.location(self.lineno)


class Program:
    """Several formulas as one function.

    Args:
        name: the name of the function.
        formulas: in topological order.
        parameters: the parameters of the function.
        results: the names that the function returns. It returns None for a name that no formula computes.
    """

    def __init__(
        self, name: str, formulas: Sequence[Formula], parameters: Sequence[str], results: Sequence[str]
    ) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        computed = {formula.target for formula in formulas}
        self.results = tuple(result if result in computed else None for result in results)
        self.scope: dict[str, Any] = {}
        """The global names that the lines read, with their values."""
        self._used_names = {*parameters, *computed}
        self.lines = [line for formula in formulas for line in self._lines_of(formula)]

    def _lines_of(self, formula: Formula) -> list[Line]:
        if formula.statements is None:
            return [self._call_line(formula)]
        names = self._name_map(formula)
        if names is None:
            return [self._call_line(formula)]
        lines = [Line(_NameReplacer(names).visit(deepcopy(x)), formula, x.lineno) for x in formula.statements]
        # A local variable may have the name of the target. Then the replacer has renamed both.
        lines[-1].statement.targets = [ast.Name(formula.target, ast.Store())]
        return lines

    def _name_map(self, formula: Formula) -> dict[str, str] | None:
        """The program's names for the formula's local and global names. None if a global name is not defined."""
        statements = formula.statements
        assert statements is not None
        local = _local_names(statements)
        names = {name: self._unused_name(name) for name in sorted(local)}
        inner = {name for x in statements for name in _inner_names(x.value)}
        read = {x.id for statement in statements for x in ast.walk(statement.value) if isinstance(x, ast.Name)}
        for name in sorted(read - local - set(formula.parameters) - inner):
            try:
                value = _lookup_global(formula.function, name)
            except (NameError, ValueError):  # undefined, or an empty closure cell
                return None
            names[name] = self._bind_global(name, value)
        return names

    def _bind_global(self, name: str, value: Any) -> str:
        """Add a value of the author's module to the program's scope. Returns its name there."""
        if name not in self.scope and name not in self._used_names:
            self.scope[name] = value
        elif self.scope.get(name) is not value:
            name = self._unused_name(name)
            self.scope[name] = value
        return name

    def _unused_name(self, name: str) -> str:
        found, n = name, 1
        while found in self._used_names or found in self.scope:
            n += 1
            found = f"{name}_{n}"
        self._used_names.add(found)
        return found

    def _call_line(self, formula: Formula) -> Line:
        """``target = Class_target(*parameters)``, a call of the formula."""
        owner = formula.function.__qualname__.rpartition(".")[0].rpartition(".")[
            2
        ]  # the class, or "" or "<locals>"
        name = self._bind_global(
            f"{owner}_{formula.target}" if owner.isidentifier() else f"_{formula.target}", formula.function
        )
        args: list[ast.expr] = [ast.Name(x, ast.Load()) for x in formula.parameters]
        target: list[ast.expr] = [ast.Name(formula.target, ast.Store())]
        call = ast.Assign(target, ast.Call(ast.Name(name, ast.Load()), args, []))
        return Line(call, formula, formula.function.__code__.co_firstlineno)

    @property
    def locations(self) -> list[str]:
        """The source location of each line."""
        return [line.location for line in self.lines]

    @property
    def source(self) -> str:
        """The program as text."""
        return self.render([ast.unparse(ast.fix_missing_locations(line.statement)) for line in self.lines])

    def render(self, lines: Iterable[str]) -> str:
        """The source of a function with these lines and the parameters and results of the program."""
        head = f"def {self.name}({', '.join(self.parameters)}):"
        end = f"return ({', '.join(map(str, self.results))}{',' if len(self.results) == 1 else ''})"
        return "\n".join([head, *(f"    {x}" for x in (*lines, end)), ""])

    def compile(self) -> Callable[..., tuple[Any, ...]]:
        return compile_source(self.source, self.name, self.scope, self.locations)


_locations: dict[str, Sequence[str]] = {}
"""For each compiled program, by its file name: the source location of each line."""


def compile_source(
    source: str, name: str, scope: Mapping[str, Any], locations: Sequence[str]
) -> Callable[..., tuple[Any, ...]]:
    """The function that the source defines. The locations are those of the lines after ``def``."""
    path = f"<{name} {len(_locations)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # for tracebacks
    _locations[path] = locations
    namespace = dict(scope)
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]


def add_source_location(error: BaseException) -> None:
    """Add the author's file and line to an error that a generated program raised."""
    traceback = error.__traceback__
    while traceback is not None:
        locations = _locations.get(traceback.tb_frame.f_code.co_filename, ())
        line = traceback.tb_lineno - 2  # line 1 is ``def``
        if 0 <= line < len(locations):
            error.add_note(f"in the formula {locations[line]}")
        traceback = traceback.tb_next


class _NameReplacer(ast.NodeTransformer):
    """Renames variables."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _inner_names(node: ast.AST) -> set[str]:
    """The names that comprehensions and lambdas in an expression bind."""
    found = set()
    for x in ast.walk(node):
        if isinstance(x, ast.comprehension):
            found |= {y.id for y in ast.walk(x.target) if isinstance(y, ast.Name)}
        elif isinstance(x, ast.Lambda):
            found |= {arg.arg for arg in ast.walk(x.args) if isinstance(arg, ast.arg)}
    return found


def _lookup_global(function: Any, name: str) -> Any:
    """The value of a global name or closure variable of a function."""
    code = function.__code__
    if name in code.co_freevars:
        return function.__closure__[code.co_freevars.index(name)].cell_contents
    if name in function.__globals__:
        return function.__globals__[name]
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise NameError(name)


def wrap_source(source: str, width: int = 100) -> str:
    """Break long lines of generated source at spaces inside brackets."""
    return "\n".join(part for line in source.splitlines() for part in _wrap_line(line, width))


def _wrap_line(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    found = []
    while len(line) > width:
        breaks = [i + 1 for i in _breakable_spaces(line) if len(indent) + 8 < i < width]
        if not breaks:
            break
        found.append(line[: breaks[-1]].rstrip())
        line = f"{indent}        {line[breaks[-1] :].lstrip()}"
    return [*found, line]


def _breakable_spaces(line: str) -> list[int]:
    """The positions of spaces inside brackets and outside quotes."""
    found, depth, quote = [], 0, ""
    for i, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            if character == " " and depth > 0:
                found.append(i)
    return found
