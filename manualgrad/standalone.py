"""Write an operation as one Python file that imports only torch.

Each rule becomes a plain `torch.autograd.Function` with the formulas of its author. The functions, classes and
constants that the formulas and the function of torch's signature need are copied from their source, without
decorators.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from manualgrad import registry
from manualgrad.rebinding import rebind_function
from manualgrad.registry import Op
from manualgrad.rule import Rule, derivation, every_rule
from manualgrad.rule.formulas import Program, syntax_tree, wrap_source

HEADER = '''"""{title} with hand-derived gradients.

Each Function computes its gradients with the formulas that its docstring derives, in the dtype of its inputs.
"""

from __future__ import annotations
'''

_OUTPUT_OF = '''def output_of(function, *args):
    """Apply a Function. Returns its output without the statistics."""
    found = function.apply(*args)
    return found[0] if isinstance(found, tuple) else found
'''

_APPLY_INPLACE = '''def apply_inplace(function, input, *settings, inplace):
    """Apply a Function of one tensor. With `inplace`, write the output into the input."""
    if not inplace:
        return output_of(function, input, *settings)
    return input.copy_(output_of(function, input.clone(), *settings))
'''

_CONSTANT_CALLS = {
    "is_vmapped": False,
    "is_large": False,
    "in_forward_mode_or_transform": False,
    "saved_tensor_hooks_active": True,
    "inplace_is_safe": False,
    "is_compiling": False,
    "has_torch_function": False,
    "has_torch_function_unary": False,
    "has_torch_function_variadic": False,
    "is_scripting": False,
}
"""Function calls that are replaced by a constant, because the file runs in eager mode without vmap."""


class Unsupported(ValueError):
    """The operation cannot be written as one file."""


def standalone_source(op: Op) -> str:
    """The source of the file for an operation.

    Raises:
        Unsupported: a part of the operation has no source that can be copied. The message names the part.
    """
    return FileBuilder().file(op)


class FileBuilder:
    """Collects the parts of a file. Each part comes after those that it needs."""

    def __init__(self) -> None:
        self.imports: set[str] = {"import torch"}
        self.parts: list[str] = []
        self.names: dict[str, Any] = {}
        """The values of the names that the file defines."""
        self.replacements = _manual_replacements()

    def file(self, op: Op) -> str:
        self.add_operation(op)
        imports = sorted(self.imports, key=lambda line: (not line.startswith("import"), line))
        standard = [x for x in imports if "torch" not in x]
        torch_imports = [x for x in imports if "torch" in x]
        blocks = ["\n".join(x) for x in (standard, torch_imports) if x]
        body = "\n\n\n".join(part.strip("\n") for part in self.parts)
        return "\n\n".join([HEADER.format(title=op.name).rstrip(), *blocks]) + f"\n\n\n{body}\n"

    def add_operation(self, op: Op) -> None:
        if isinstance(op.implementation, str):
            self.add_torch_function(op.name, op.reference)
        else:
            self.add_function(op.name, inspect.unwrap(op.implementation))

    # --- functions ---

    def add_function(self, name: str, function: Any) -> str:
        """Add a Python function of manualgrad or torch. Returns its name in the file."""
        if (known := self._register(name, function)) is not None:
            return known
        name = next(known for known, value in self.names.items() if value is function)
        tree = syntax_tree(function) or _lambda_as_function(name, function)
        if tree is None:
            raise Unsupported(f"{function.__qualname__} has no source")
        tree = deepcopy(tree)
        tree.name = name
        tree.decorator_list = [x for x in tree.decorator_list if "cache" in ast.unparse(x)]
        if tree.decorator_list:
            self.imports.add("import functools")
        Rewriter(self, function).rewrite(tree)
        self.parts.append(_unparse(tree))
        return name

    def _register(self, name: str, value: Any) -> str | None:
        """The name of a value that the file has already. Otherwise reserve the name and return None."""
        for known, other in self.names.items():
            if other is value:
                return known
        while name in self.names:  # a function of torch and its kernel may have the same name
            name = f"{name}_kernel"
        self.names[name] = value
        return None

    def add_torch_function(self, name: str, function: Any) -> str:
        """Add a function of torch that checks its arguments and calls functions of manualgrad."""
        function = inspect.unwrap(function)
        closure = inspect.getclosurevars(function).nonlocals if isinstance(function, FunctionType) else {}
        if {"if_true", "if_false"} <= closure.keys():
            return self._add_boolean_dispatch(name, function, dict(closure))
        if not isinstance(function, FunctionType):
            raise Unsupported(f"{name} is not written in Python")
        return self.add_function(name, function)

    def _add_boolean_dispatch(self, name: str, function: Any, closure: dict[str, Any]) -> str:
        """Add a function that `torch._jit_internal.boolean_dispatch` made from two functions and a flag."""
        if (known := self._register(name, function)) is not None:
            return known
        flag = closure["arg_name"]
        names = [
            self.add_torch_function(x.__name__.lstrip("_") + suffix, x)
            for x, suffix in _boolean_branches(closure, name)
        ]
        signature = inspect.signature(inspect.unwrap(closure["if_true"]))
        arguments = ", ".join(signature.parameters)
        head = ", ".join(
            x if p.default is inspect.Parameter.empty else f"{x}={p.default!r}"
            for x, p in signature.parameters.items()
        )
        lines = [f"function = {names[0]} if {flag} else {names[1]}", f"return function({arguments})"]
        self.parts.append("\n    ".join([f"def {name}({head}):", *lines]))
        return name

    def add_helper(self, name: str, text: str) -> None:
        if name not in self.names:
            self.names[name] = text
            self.parts.append(text)

    # --- rules ---

    def add_rule(self, rule: type[Rule]) -> str:
        if (known := self._register(rule.__name__, rule)) is not None:
            return known
        self.parts.append(RuleWriter(self, rule).text())
        return rule.__name__

    # --- other names ---

    def expression_for(self, name: str, value: Any, module: ModuleType | None) -> ast.expr:
        """Add the value of a global name. Returns the expression for it."""
        if isinstance(value, type) and issubclass(value, Rule):
            return _name(self.add_rule(value))
        if str(getattr(value, "__module__", "")).startswith("manualgrad.ops.") and callable(value):
            inner = value if isinstance(value, type) else inspect.unwrap(value)
            if isinstance(inner, FunctionType):
                return _name(self.add_function(name, inner))
        if isinstance(value, FunctionType) and value.__module__ == "torch.nn.functional":
            return self.add_torch_module_function(value)
        if isinstance(value, type) and value.__module__.startswith("manualgrad."):
            return _name(self.add_class(name, value))
        if module is not None:
            self.add_module_name(name, value, module)
        return _name(name)

    def add_torch_module_function(self, value: FunctionType) -> ast.expr:
        """The expression for a Python function of torch.nn.functional. Copy it if it calls functions of
        manualgrad."""
        if rebind_function(value) is not value:
            return _name(self.add_torch_function(value.__name__, value))
        self.imports.add("import torch.nn.functional as F")
        return ast.Attribute(_name("F"), value.__name__, ast.Load())

    def has_replacement(self, value: Any) -> bool:
        """The value is a function or kernel of torch that manualgrad replaces."""
        try:
            return value in self.replacements
        except TypeError:  # not hashable
            return False

    def replacement(self, kernel: Any) -> ast.expr:
        """The expression for manualgrad's function in place of a function or kernel of torch."""
        found = self.replacements[kernel]
        if isinstance(found, type):
            return ast.Attribute(_name(self.add_rule(found)), "apply", ast.Load())
        if isinstance(found, str):
            return _name(self.add_torch_function(found, getattr(F, found)))
        return _name(self.add_function(found.__name__, found))

    def add_class(self, name: str, cls: type) -> str:
        if (known := self._register(name, cls)) is not None:
            return known
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        module = inspect.getmodule(cls)
        assert module is not None
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                method = getattr(cls, node.name)
                Rewriter(self, inspect.unwrap(getattr(method, "__func__", method)), {cls.__name__}).rewrite(node)
        for node in [*tree.decorator_list, *tree.bases]:
            for x in ast.walk(node):
                if isinstance(x, ast.Name) and x.id in vars(module):
                    self.expression_for(x.id, vars(module)[x.id], module)
        self.parts.append(_unparse(tree))
        return name

    def add_module_name(self, name: str, value: Any, module: ModuleType) -> None:
        """Add the import or assignment with which a module binds a name."""
        if self.names.get(name, self) is value or hasattr(builtins, name):
            return
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name.partition(".")[0]) == name:
                        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("manualgrad"):
                            self.add_module_name(name, value, importlib.import_module(str(node.module)))
                        else:
                            self.names[name] = value
                            self.imports.add(_import_statement(node, alias))
                        return
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _bound_names(node):
                self._assignment(name, value, module, node)
                return
        if isinstance(value, ModuleType):
            self.names[name] = value
            self.imports.add(f"import {value.__name__} as {name}")
            return
        raise Unsupported(f"{module.__name__}.{name} has no import or assignment that can be copied")

    def _assignment(self, name: str, value: Any, module: ModuleType, node: Any) -> None:
        target: Any = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        assigned: Any = node.value
        for x in ast.walk(target):
            if isinstance(x, ast.Name):
                self.names[x.id] = vars(module)[x.id]
        for x in ast.walk(assigned):
            if isinstance(x, ast.Name) and x.id in vars(module) and x.id != name:
                self.expression_for(x.id, vars(module)[x.id], module)
        if isinstance(value, ModuleType):
            self.parts.append(f"{name} = {value.__name__}")
        elif isinstance(target, ast.Name) and isinstance(value, float | int | str):
            self.parts.append(f"{name} = {value!r}")
        else:
            self.parts.append(f"{ast.unparse(target)} = {ast.unparse(assigned)}")


def _boolean_branches(closure: dict[str, Any], name: str) -> list[tuple[Any, str]]:
    found = []
    for key in ("if_true", "if_false"):
        function = closure[key]
        found.append((function, "_only" if function.__name__.lstrip("_") == name else ""))
    return found


def _import_statement(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    bound = f" as {alias.asname}" if alias.asname else ""
    if isinstance(node, ast.Import):
        return f"import {alias.name}{bound}"
    return f"from {node.module} import {alias.name}{bound}"


@functools.cache
def _manual_replacements() -> dict[Any, Any]:
    """For functions and kernels of torch: the rule or function of manualgrad, or the name of a function of torch
    that calls manualgrad."""
    rules = {rule.apply: rule for rule in every_rule() if "apply" in vars(rule)}
    found: dict[Any, Any] = {}
    for op in registry.ops().values():
        found[op.reference] = (
            op.implementation if isinstance(op.implementation, str) else inspect.unwrap(op.implementation)
        )
    for kernel, replacement in registry.kernel_replacements.items():
        inner = inspect.unwrap(replacement, stop=lambda f: f in rules)
        found[kernel] = rules.get(inner, inner)
    return {key: value for key, value in found.items() if not isinstance(value, str) or hasattr(F, value)}


class Rewriter(ast.NodeTransformer):
    """Rewrites a function for the file: with the names of the file, and without branches that the file does not
    need."""

    def __init__(self, builder: FileBuilder, function: Any, known: Iterable[str] = ()) -> None:
        self.builder = builder
        self.scope: dict[str, Any] = dict(getattr(function, "__globals__", {}))
        self.module = inspect.getmodule(function)
        code = getattr(function, "__code__", None)
        self.closure: dict[str, Any] = {}
        if code is not None and code.co_freevars:
            cells = function.__closure__ or ()
            self.closure = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
        self.function = function
        self.local: set[str] = set(known)
        self.is_torch_code = str(getattr(function, "__module__", "")).startswith("torch")
        """The function belongs to torch. Its calls of replaced functions call manualgrad's."""

    def rewrite(self, tree: ast.AST) -> None:
        if isinstance(tree, ast.FunctionDef):
            _drop_annotations(tree)
            if len(tree.body) > 1 and isinstance(tree.body[0], ast.Expr):
                _shorten_docstring(tree)
        self.local |= _bound_names(tree)
        self.local -= self.closure.keys()
        if isinstance(tree, ast.FunctionDef):
            tree.args.defaults = [self.visit(x) for x in tree.args.defaults]
            tree.args.kw_defaults = [x and self.visit(x) for x in tree.args.kw_defaults]
            tree.body = _flatten([self.visit(x) for x in tree.body]) or [ast.Pass()]

    # --- names ---

    def resolve(self, node: ast.expr) -> Any:
        """The value of a dotted name. The expression itself if the value is unknown."""
        if isinstance(node, ast.Name):
            if node.id in self.closure:
                return self.closure[node.id]
            return node if node.id in self.local else self.scope.get(node.id, node)
        if isinstance(node, ast.Attribute):
            value = self.resolve(node.value)
            return node if isinstance(value, ast.AST) else getattr(value, node.attr, node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not isinstance(node.ctx, ast.Load) or node.id in self.local:
            return node
        if node.id in self.closure:
            return self._closure_value(node.id, self.closure[node.id])
        if node.id in self.scope:
            value = self.scope[node.id]
            if self.is_torch_code and self.builder.has_replacement(value):
                return self.builder.replacement(value)
            return self.builder.expression_for(node.id, value, self.module)
        return node

    def _closure_value(self, name: str, value: Any) -> ast.expr:
        if isinstance(value, bool | int | float | str) or value is None:
            return ast.Constant(value)
        if callable(value) and inspect.unwrap(value) is self.function:
            return _name(self.builder.add_function(name, self.function))
        if isinstance(value, type | FunctionType):
            known = name if value.__name__ == "<lambda>" else value.__name__
            return self.builder.expression_for(known, value, inspect.getmodule(value))
        dotted = _dotted_name(value)
        if dotted is None:
            raise Unsupported(f"the closure variable {name} = {value!r} has no source")
        return ast.parse(dotted, mode="eval").body

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.resolve(node)
        if self.is_torch_code and self.builder.has_replacement(value):
            return self.builder.replacement(value)
        if self.is_torch_code and isinstance(value, FunctionType) and value.__module__ == "torch.nn.functional":
            return self.builder.add_torch_module_function(value)
        if node.attr == "autocast":
            return ast.Dict([], [])
        owner = self.resolve(node.value)
        if isinstance(owner, type) and issubclass(owner, Rule) and node.attr != "apply":
            return _name(self.builder.add_function(f"{node.attr}_of_{owner.__name__}", value))
        node.value = self.visit(node.value)
        return node

    # --- what the file does not need ---

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _CONSTANT_CALLS and name not in self.local:
            return ast.Constant(_CONSTANT_CALLS[name])
        if (
            name in ("unwrap_functorch", "fast_version", "with_reuse", "rebind_function")
            and name not in self.local
        ):
            return self.visit(node.args[0])
        if name == "autocast_inputs" and len(node.args) == 2 and name not in self.local:
            return self.visit(node.args[1])
        if name in ("_apply_activation", "apply_"):
            return self._inplace_call(node)
        rule = self.resolve(node.func.value) if isinstance(node.func, ast.Attribute) and name == "apply" else None
        with_statistics = [x.value for x in node.keywords if x.arg == "with_statistics"]
        node.keywords = [x for x in node.keywords if x.arg != "with_statistics"]
        self.generic_visit(node)
        if isinstance(rule, type) and issubclass(rule, Rule) and rule.statistics:
            return self._without_statistics(node, with_statistics)
        if isinstance(rule, ast.Name):  # a parameter
            self.builder.add_helper("output_of", _OUTPUT_OF)
            return ast.Call(_name("output_of"), [rule, *node.args], node.keywords)
        return node

    def _without_statistics(self, node: ast.expr, with_statistics: Sequence[ast.expr]) -> ast.expr:
        first = ast.Subscript(node, ast.Constant(0), ast.Load())
        if not with_statistics:
            return first
        wanted = self._static_condition(with_statistics[0])
        if wanted is None:
            raise Unsupported("with_statistics depends on an argument")
        return node if wanted else first

    def _static_condition(self, node: ast.expr) -> bool | None:
        """The value of a condition if it is known when the file is written, otherwise None."""
        match node:
            case ast.Constant(value):
                return bool(value)
            case ast.Compare(left, [ast.Is()], [right]):
                a, b = self.resolve(left), self.resolve(right)
                return None if isinstance(a, ast.AST) or isinstance(b, ast.AST) else a is b
            case ast.UnaryOp(ast.Not(), operand):
                value = self._static_condition(operand)
                return None if value is None else not value
            case ast.Name() | ast.Attribute():
                value = self.resolve(node)
                return None if isinstance(value, ast.AST) or not isinstance(value, bool | int) else bool(value)
        return None

    def _inplace_call(self, node: ast.Call) -> ast.expr:
        self.builder.add_helper("output_of", _OUTPUT_OF)
        self.builder.add_helper("apply_inplace", _APPLY_INPLACE)
        args = [self.visit(x) for x in node.args]
        keywords = [ast.keyword(x.arg, self.visit(x.value)) for x in node.keywords if x.arg == "inplace"]
        if isinstance(node.func, ast.Attribute):  # rule.apply_(input)
            args.insert(0, self.visit(node.func.value))
            keywords = [ast.keyword("inplace", ast.Constant(True))]
        return ast.Call(_name("apply_inplace"), args, keywords)

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        truth = (
            self._static_condition(node.test)
            if _is_constant_bool(node.test) or isinstance(node.test, ast.Compare)
            else None
        )
        if truth is None:
            node.body = _flatten([self.visit(x) for x in node.body]) or [ast.Pass()]
            node.orelse = _flatten([self.visit(x) for x in node.orelse])
            return node
        return _flatten([self.visit(x) for x in (node.body if truth else node.orelse)]) or None

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node.test = self.visit(node.test)
        truth = self._static_condition(node.test) if _is_constant_bool(node.test) else None
        if truth is None:
            node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
            return node
        return self.visit(node.body if truth else node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        is_and = isinstance(node.op, ast.And)
        decided = [x.value for x in node.values if isinstance(x, ast.Constant) and isinstance(x.value, bool)]
        if any(value is not is_and for value in decided):
            return ast.Constant(not is_and)
        node.values = [x for x in node.values if not (isinstance(x, ast.Constant) and isinstance(x.value, bool))]
        if not node.values:
            return ast.Constant(is_and)
        return node if len(node.values) > 1 else node.values[0]

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def _comprehension(self, node: Any) -> Any:
        """Names that a comprehension binds hide closure variables."""
        bound = {x.id for part in node.generators for x in ast.walk(part.target) if isinstance(x, ast.Name)}
        hidden = {name: self.closure.pop(name) for name in bound & self.closure.keys()}
        new = bound - self.local
        self.local |= new
        self.generic_visit(node)
        self.local -= new
        self.closure |= hidden
        return node

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _comprehension

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        _drop_annotations(node)
        node.body = _flatten([self.visit(x) for x in node.body])
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign | None:
        return None if node.value is None else ast.Assign([node.target], self.visit(node.value))


def _is_constant_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


class RuleWriter:
    """A rule as a `torch.autograd.Function`."""

    def __init__(self, builder: FileBuilder, rule: type[Rule]) -> None:
        self.builder, self.rule = builder, rule
        self.spec = rule.implementation.spec
        self.gradients = [name for name in self.spec.gradients if name in self.spec.formulas]
        available = self.spec.available
        self.formulas = self.spec.formulas_for(self.gradients, available)
        self.needs = {f.target: self._gradients_using(f.target) for f in self.formulas}
        names = {name for f in self.formulas for name in f.parameters}
        self.tensors = [x for x in self.spec.values if x in names and x not in self.spec.settings]
        self.settings = [x for x in self.spec.values if x in names and x in self.spec.settings]

    def _gradients_using(self, target: str) -> list[str]:
        return [
            g
            for g in self.gradients
            if any(f.target == target for f in self.spec.formulas_for([g], self.spec.available))
        ]

    def _gradients_reading(self, name: str) -> list[str]:
        """The gradients that need a saved value."""
        return [
            g
            for g in self.gradients
            if any(name in f.parameters for f in self.spec.formulas_for([g], self.spec.available))
        ]

    def text(self) -> str:
        text = textwrap.indent(derivation(self.rule), "    ").lstrip()
        parts = [
            f'class {self.rule.__name__}(torch.autograd.Function):\n    r"""{text}\n    """',
            *self._attributes(),
            textwrap.indent(self._forward(), "    "),
            wrap_source(textwrap.indent(self._setup_context(), "    ")),
            wrap_source(textwrap.indent(self._backward(), "    ")),
        ]
        return "\n\n".join(parts)

    def _attributes(self) -> list[str]:
        """Constants that the rule declares and its methods read."""
        names = {name for cls in self.rule.__mro__ if cls is not Rule for name in inspect.get_annotations(cls)}
        return [
            f"    {name} = {getattr(self.rule, name)!r}"
            for name in sorted(names - vars(Rule).keys())
            if isinstance(getattr(self.rule, name, None), int | float | str)
        ]

    def _forward(self) -> str:
        tree = syntax_tree(self.rule.forward)
        if tree is None:
            raise Unsupported(f"the forward of {self.rule.__name__} has no source")
        tree = deepcopy(tree)
        tree.name = "forward"
        tree.decorator_list = []
        Rewriter(self.builder, self.rule.forward, {self.rule.__name__}).rewrite(tree)
        return f"@staticmethod\n{_unparse(tree)}"

    def _setup_context(self) -> str:
        lines = [f"{_tuple_source(self._inputs())} = inputs"]
        if self.rule.statistics:
            output = "output" if "output" in self.tensors else "_"
            lines.append(f"{output}, {', '.join(self.rule.statistics)} = output")
            lines.append(f"ctx.mark_non_differentiable({', '.join(self.rule.statistics)})")
        saved = [self._saved_expression(name) for name in self.tensors]
        if any(" if need_" in x for x in saved):
            lines.append(self._needs_input_grad_line())
        if saved:
            lines.append(f"ctx.save_for_backward({', '.join(saved)})")
        lines += [f"ctx.{name} = {name}" for name in self.settings]
        return "@staticmethod\ndef setup_context(ctx, inputs, output):\n" + textwrap.indent(
            "\n".join(lines), "    "
        )

    def _inputs(self) -> list[str]:
        used = {*self.tensors, *self.settings}
        return [
            name if name in used else f"_{name}" if len(self.spec.inputs) == 1 else "_"
            for name in self.spec.inputs
        ]

    def _needs_input_grad_line(self) -> str:
        names = [f"need_{x}" if f"grad_{x}" in self.gradients else "_" for x in self.spec.inputs]
        while len(names) > 1 and names[-1] == "_":
            names.pop()
        rest = ", *_" if len(names) < len(self.spec.inputs) else ""
        return f"{', '.join(names)}{rest or (',' if len(names) == 1 else '')} = ctx.needs_input_grad"

    def _condition(self, needed: Sequence[str]) -> str:
        if len(needed) == len(self.gradients):
            return ""
        return " or ".join(f"need_{x.removeprefix('grad_')}" for x in needed)

    def _saved_expression(self, name: str) -> str:
        condition = self._condition(self._gradients_reading(name))
        return f"{name} if {condition} else None" if condition else name

    def _backward(self) -> str:
        program = Program("backward", self.formulas, (*self.tensors, *self.settings, "grad"), self.spec.gradients)
        lines: list[str] = []
        if self.tensors:
            lines.append(f"{_tuple_source(self.tensors)} = ctx.saved_tensors")
        lines += [f"{name} = ctx.{name}" for name in self.settings]
        if len(self.gradients) > 1:
            lines.append(self._needs_input_grad_line())
            lines.append(f"{' = '.join(self.gradients)} = None")
        rewriter = Rewriter(self.builder, None)
        rewriter.scope = program.scope
        rewriter.local = {*program.parameters, *(f.target for f in self.formulas)}
        open_condition = ""
        for line in program.lines:
            rewriter.module = inspect.getmodule(line.formula.function)
            rewriter.local |= {x.id for x in ast.walk(line.statement.targets[0]) if isinstance(x, ast.Name)}
            text = self._line(rewriter, line)
            condition = self._condition(self.needs[line.formula.target])
            if condition != open_condition and condition:
                lines.append(f"if {condition}:")
            open_condition = condition
            lines.append(f"    {text}" if condition else text)
        results = [name if name in self.gradients else "None" for name in self.spec.gradients]
        lines.append(f"return {', '.join(results)}")
        head = "@staticmethod\n"
        if self.spec.differentiable_statistics:
            self.builder.imports.add("from torch.autograd.function import once_differentiable")
            head += "@once_differentiable  # the saved statistics depend on the inputs\n"
        arguments = "ctx, grad, *_" if self.rule.statistics else "ctx, grad"
        return f"{head}def backward({arguments}):\n" + textwrap.indent("\n".join(lines), "    ")

    def _line(self, rewriter: Rewriter, line: Any) -> str:
        statement = deepcopy(line.statement)
        value = statement.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            function = rewriter.scope.get(value.func.id)
            if function is line.formula.function:  # a method that is not inlined
                name = self.rule.__name__.removesuffix("Function")
                value.func.id = self.builder.add_function(f"{line.formula.target}_of_{name}", function)
                return ast.unparse(ast.fix_missing_locations(statement))
        statement.value = rewriter.visit(value)
        return ast.unparse(ast.fix_missing_locations(statement))


# --- syntax trees ---


def _lambda_as_function(name: str, function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a lambda as a named function."""
    module = inspect.getmodule(function)
    if module is None or function.__name__ != "<lambda>":
        return None
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Lambda) and node.lineno == function.__code__.co_firstlineno:
            arguments = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
            (found,) = ast.parse(f"def {name}({arguments}):\n    return {ast.unparse(node.body)}").body
            assert isinstance(found, ast.FunctionDef)
            return found
    return None


def _unparse(tree: ast.AST) -> str:
    return wrap_source(ast.unparse(ast.fix_missing_locations(tree)))


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _tuple_source(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) > 1 else f"({names[0]},)"


def _flatten(found: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    for x in found:
        out += x if isinstance(x, list) else [] if x is None else [x]
    return out


def _drop_annotations(tree: ast.FunctionDef) -> None:
    tree.returns = None
    args = tree.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None


def _shorten_docstring(tree: ast.FunctionDef) -> None:
    """Keep the first paragraph."""
    first = tree.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        paragraph = inspect.cleandoc(first.value.value).split("\n\n")[0]
        first.value.value = paragraph.replace("\\", "")


def _bound_names(tree: ast.AST) -> set[str]:
    found = {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    found |= {x.arg for x in ast.walk(tree) if isinstance(x, ast.arg)}
    return found | {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x is not tree}


def _dotted_name(value: Any) -> str | None:
    """The dotted name of a function of torch, or a builtin."""
    name = getattr(value, "__name__", None)
    for space, prefix in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):  # type: ignore[attr-defined]
        if name and getattr(space, name, None) is value:
            return f"{prefix}.{name}"
    return name if isinstance(value, BuiltinFunctionType) and hasattr(builtins, str(name)) else None
