"""Record the torch functions that Python code calls, as lines of a program.

`Trace` is a `TorchFunctionMode`. Code that runs inside it gets fake tensors, which have a shape and a dtype but no
values. Each call of a torch function or of a tensor's method becomes a `Call`. Branches, loops, helper functions
and classes of the code leave no trace: only the calls of torch that they lead to, with the arguments they have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Variable:
    """A tensor of a program: the result of a call, a parameter, a buffer or an input.

    Attributes:
        name: for the text. The text adds a number if the name is taken.
        tensor: the fake tensor.
        path: the name in ``state`` of a parameter or a buffer, otherwise None.
    """

    def __init__(self, name: str, tensor: Tensor, path: str | None = None) -> None:
        self.name, self.tensor, self.path = name, tensor, path
        self.needs_grad = False
        self.is_named = False
        """The text gives it a separate line."""

    def __repr__(self) -> str:
        return f"{self.name}: {str(self.tensor.dtype).removeprefix('torch.')}{list(self.tensor.shape)}"


class Call:
    """``outputs = function(*args, **kwargs)``, in which a `Variable` stands for each tensor."""

    def __init__(self, function: Any, args: Any, kwargs: Any, outputs: Any, module: str = "") -> None:
        self.function, self.args, self.kwargs, self.outputs = function, args, kwargs, outputs
        self.module = module

    @property
    def reads(self) -> list[Variable]:
        return variables((self.args, self.kwargs))

    @property
    def writes(self) -> list[Variable]:
        return variables(self.outputs)

    @property
    def is_inplace(self) -> bool:
        """The call writes into its first argument."""
        return is_inplace(self.function)

    def __repr__(self) -> str:
        return f"{self.outputs} = {self.function}({self.args}, {self.kwargs})"


def variables(values: Any) -> list[Variable]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Variable)]


def function_name(function: Any) -> str:
    """The name of a torch function, a method or a property, without overload and underscores of a dunder."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name.partition("::")[2]
    name = getattr(function, "__name__", "")
    return function.__self__.__name__ if name == "__get__" else name


def is_inplace(function: Any) -> bool:
    name = function_name(function)
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")


_IDENTITIES = frozenset(
    [
        "reshape",
        "view",
        "expand",
        "expand_as",
        "sum_to_size",
        "flatten",
        "unflatten",
        "contiguous",
        "to",
        "float",
        "conj",
        "resolve_conj",
        "squeeze",
    ]
)


class Trace(TorchFunctionMode):
    """Records the calls that run inside it.

    Args:
        override: is asked for each torch function. It may return a function that is called instead. The calls that
            this function makes are recorded.
    """

    def __init__(self, override: Callable[[Any, Any, Any], Callable[..., Any] | None] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.override = override
        self._variables: dict[int, Variable] = {}
        self.module = ""
        """The path of the module that calls."""
        self._kept: list[Tensor] = []
        self._profiles = 0

    def add(self, variable: Variable) -> Variable:
        """From now on `variable` stands for its tensor."""
        self._variables[id(variable.tensor)] = variable
        return variable

    def find(self, tensor: Tensor) -> Variable | None:
        return self._variables.get(id(tensor))

    def replace(self, values: Any) -> Any:
        """The values with the variables in place of the tensors."""

        def variable(tensor: Tensor) -> Variable:
            found = self.find(tensor)
            if found is None:
                raise RuntimeError(f"a tensor of shape {list(tensor.shape)} comes from outside of the traced code")
            return found

        return pytree.tree_map_only(Tensor, variable, values)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.override is not None and (other := self.override(func, args, kwargs)) is not None:
            with self:
                return other(*args, **kwargs)
        return self.record(func, args, kwargs)

    def _is_identity(self, func: Any, args: Any, result: Any) -> bool:
        """The function changes nothing: a reshape to the same shape, a cast to the same dtype."""
        if function_name(func) not in _IDENTITIES or not isinstance(result, Tensor):
            return False
        input = args[0]
        return (
            isinstance(input, Tensor)
            and self.find(input) is not None
            and input.dtype == result.dtype
            and tuple(input.shape) == tuple(result.shape)
            and input.stride() == result.stride()
        )

    def __enter__(self) -> Trace:
        if not self._profiles:
            sys.setprofile(self._name_locals)
        self._profiles += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._profiles -= 1
        if not self._profiles:
            sys.setprofile(None)

    def _name_locals(self, frame: FrameType, event: str, arg: Any) -> None:
        """When a function of manualgrad.ops returns, name its variables as the function does."""
        if event != "return" or "/ops/" not in frame.f_code.co_filename:
            return
        parameters = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        for name, value in frame.f_locals.items():
            variable = self.find(value) if isinstance(value, Tensor) and name not in parameters else None
            if variable is not None and not variable.is_named and variable.path is None:
                variable.name = name

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a torch function and record the call."""
        result = func(*args, **kwargs)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if not outputs:
            return result
        if is_inplace(func):
            new_args, new_kwargs = self.replace((args, kwargs))
            written = self.find(args[0])
            assert written is not None
            self.calls.append(Call(func, new_args, new_kwargs, written, self.module))
            return result
        if isinstance(result, Tensor) and self.find(result) is not None:
            return result  # the function returned an argument
        if self._is_identity(func, args, result):
            self._variables[id(result)] = self._variables[id(args[0])]
            self._kept.append(result)
            return result
        new_args, new_kwargs = self.replace((args, kwargs))
        name = function_name(func).strip("_")
        for output in outputs:
            if self.find(output) is None:
                self.add(Variable(name, output))
        self.calls.append(Call(func, new_args, new_kwargs, self.replace(result), self.module))
        return result
