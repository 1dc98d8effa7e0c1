"""Conversion of an existing model to manualgrad and back, in place.

A module of `torch.nn` and its counterpart in manualgrad differ in their class only. So conversion sets the class
of each module. The model, its modules, parameters, buffers, hooks, optimizers and tied weights stay the same
objects.

    a class of torch.nn         becomes manualgrad's class of this name (see `manualgrad.rebinding`)
    a subclass of one           a generated subclass of both, if it overrides no method that manualgrad rebinds
    parametrized                the class that `torch.nn.utils.parametrize` made, with its base converted
    known to an adapter         a generated subclass with the adapter's forward (see `manualgrad.adapters`)
    any other with a forward    if ``functional``, a generated subclass that runs in `override_torch_functions`
    in-place ReLU before a pool a generated subclass that saves a bit mask: the pool does not save its input

A function that a module holds as an attribute (an ``activation``) is replaced too. `revert` reads the original
class off the converted one. No other state exists, so a converted model can be copied, pickled and sent to another
process.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manualgrad import adapters, rebinding
from manualgrad.nn import functional as manual_functional
from manualgrad.ops.activation import leaky_relu_with_mask, relu_with_mask
from manualgrad.override import override_torch_functions

Model = TypeVar("Model", bound=nn.Module)
Class = type[nn.Module]


def convert(model: Model, *, functional: bool = False, fused_loss: bool = False) -> Model:
    """Convert the `torch.nn` modules of a model to manualgrad's, in place.

        model = manualgrad.convert(torchvision.models.resnet18())

    Either all of the model is converted or, after an exception, nothing.

    Args:
        model: a network, a layer or a loss; it may be inside DataParallel, DDP or torch.compile. functional: the
        model's own ``forward`` methods run inside `override_torch_functions`, so the functions that
            they call (``F.relu``, ``x.softmax(-1)``) are manualgrad's.
        fused_loss: a causal language model of `transformers` that is given labels in training computes its loss by
            `linear_cross_entropy`, which never holds all logits in memory. Its output then has no logits.

    Returns:
        The same model. `conversion_report` lists what was done to each module; `revert` undoes it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `fused_loss` is set, and no causal language model with the usual loss is in the model.
        Exception: what a module's class or an adapter raises, with a note that names the module.
    """
    changes = _Changes(model, _manual_functions())
    for module in changes.modules:
        changes.add(module, lambda module: _converted_class(module, functional).cls)
    for module in changes.modules:
        if isinstance(module, nn.Sequential):
            for activation, following in itertools.pairwise(module):
                if isinstance(following, _POOLS) and getattr(activation, "inplace", False):
                    changes.add(activation, lambda activation: _mask_saving_class(changes.classes[activation]))
    if fused_loss:
        language_models = [module for module in changes.modules if adapters.supports_fused_loss(module)]
        if not language_models:
            raise ValueError(
                f"fused_loss: this {type(model).__name__} has no causal language model of transformers with a "
                "linear head and the usual loss"
            )
        for module in language_models:
            head: Any = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
            changes.add(module, lambda module: _fused_class(changes.classes[module], adapters.fused_model))
            changes.add(head, lambda head: _fused_class(changes.classes[head], adapters.fused_head))
    changes.apply()
    return model


def revert(model: Model) -> Model:
    """Convert a model back to torch's own modules, in place: after `convert`, or if built from `manualgrad.nn`.

    Raises:
        TypeError: `model` is not a module.
    """
    changes = _Changes(model, _torch_functions())
    for module in changes.modules:
        changes.add(module, _original_class)
    changes.apply()
    return model


@contextmanager
def reverted(model: nn.Module) -> Iterator[None]:
    """Inside this context the model's modules are torch's own. See `revert`."""
    changes = _Changes(model, _torch_functions())
    for module in changes.modules:
        changes.add(module, _original_class)
    undo = changes.apply()
    try:
        yield
    finally:
        undo()


class ReportRow(NamedTuple):
    """How one module was converted."""

    name: str
    """As in `named_modules`; "" for the model itself."""
    class_name: str
    converted: bool
    note: str
    """Why the module is not converted, or how it is."""


class ConversionReport(NamedTuple):
    """How the modules of a model were converted. As a string: a table with a line for equal rows."""

    rows: tuple[ReportRow, ...]

    def __str__(self) -> str:
        counts = Counter((row.converted, row.class_name, row.note) for row in self.rows)
        first = {(row.converted, row.class_name, row.note): row.name for row in reversed(self.rows)}
        width = max(len(class_name) for _, class_name, _ in counts)
        lines = []
        for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
            converted, class_name, note = key
            where = f"{note}  ({first[key] or 'the model'}{', ...' if count > 1 else ''})" if note else ""
            lines.append(f"{'converted' if converted else 'unchanged'} {count:5} {class_name:{width}}  {where}")
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """How each module of a model was converted, and why not where it was not.

    Raises:
        TypeError: `model` is not a module.
    """
    _modules(model)
    rows: list[ReportRow] = []
    for name, module in model.named_modules():
        cls, note = _converted_class(module, functional=False)
        note = note if cls is type(module) else "can be converted"
        rows.append(ReportRow(name, type(module).__name__, _original_class(module) is not type(module), note))
    return ConversionReport(tuple(rows))


# --- changes to a model ---


def _modules(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got a {type(model).__name__}")
    return list(model.modules())


class _Changes:
    """The new classes of a model's modules. All are found before the first is set; `apply` sets all or none."""

    def __init__(self, model: nn.Module, functions: dict[Any, Any]) -> None:
        self.modules = _modules(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.classes: dict[nn.Module, Class] = {}
        self.functions = functions

    def add(self, module: nn.Module, new_class: Callable[[Any], Class]) -> None:
        with self._error_note(module):
            self.classes[module] = new_class(module)

    def apply(self) -> Callable[[], None]:
        """Set the classes, and replace the functions that the modules hold. Returns a function that undoes it."""
        done: list[tuple[nn.Module, Class, dict[str, Any]]] = []

        def undo() -> None:
            for module, cls, old in reversed(done):
                _set_class(module, cls)
                vars(module).update(old)

        try:
            for module, cls in self.classes.items():
                with self._error_note(module):
                    attributes, functions = vars(module), self.functions
                    new = {
                        name: functions[value]
                        for name, value in attributes.items()
                        if isinstance(value, _FUNCTION) and value in functions
                    }
                    done.append((module, type(module), {name: attributes[name] for name in new}))
                    _set_class(module, cls)
                    attributes.update(new)
        except BaseException:
            undo()
            raise
        return undo

    @contextmanager
    def _error_note(self, module: nn.Module) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = self.names.get(module) or "(the model)"
            error.add_note(f"manualgrad, at {name} ({type(module).__qualname__}): the model is unchanged")
            raise


def _set_class(module: nn.Module, cls: Class) -> None:
    if cls is not type(module):
        object.__setattr__(module, "__class__", cls)  # a class may define its own __setattr__
        attributes = vars(module)
        attributes["_class_changed"] = True  # torch.compile of torch 2.11 rechecks guards only if the dict changes
        del attributes["_class_changed"]


# --- the class that a module gets ---


class _Conversion(NamedTuple):
    cls: Class
    note: str = ""


def _converted_class(module: nn.Module, functional: bool) -> _Conversion:
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return _Conversion(cls, "was compiled by TorchScript")
    if "forward" in vars(module):
        return _Conversion(cls, "has a forward set on the module itself")
    if parametrize.is_parametrized(module):
        base, note = _convert_class(cls.__bases__[0], functional)
        return _Conversion(_with_base(cls, base), note)
    if _revert_class(cls) is cls and _manual_class(cls) is cls and (forward := adapters.find_adapter(module)):
        return _Conversion(_with_adapter(cls, forward))
    return _convert_class(cls, functional)


def _original_class(module: nn.Module) -> Class:
    cls = type(module)
    if parametrize.is_parametrized(module):
        return _with_base(cls, _revert_class(cls.__bases__[0]))
    return _revert_class(cls)


def _convert_class(cls: Class, functional: bool) -> _Conversion:
    if _revert_class(cls) is not cls:
        return _Conversion(cls, getattr(cls, "_note", ""))
    torch_class = next((base for base in cls.__mro__ if _manual_class(base) is not base), None)
    if torch_class is cls:
        return _Conversion(_manual_class(cls))
    overridden = _overridden_names(cls, torch_class) if torch_class else []
    if torch_class and not overridden:
        return _Conversion(_with_manual_base(cls))
    if cls.forward.__module__.startswith("torch."):
        return _Conversion(cls, "calls nothing that manualgrad replaces")
    if functional:
        return _Conversion(_with_override(cls))
    overrides = f" (overrides {', '.join(overridden)} of {torch_class.__name__})" if torch_class else ""
    return _Conversion(cls, f"defines its own forward{overrides}: needs functional=True")


def _revert_class(cls: Class) -> Class:
    while "_generated_from" in vars(cls):
        cls = vars(cls)["_generated_from"][1][0]
    return next((base for base in cls.__bases__ if _manual_class(base) is cls), cls)


def _manual_class(cls: Any) -> Any:
    """manualgrad's class for one of torch.nn; the class itself if there is none."""
    return rebinding.rebind(cls)


def _overridden_names(cls: Class, torch_class: Class) -> list[str]:
    """What a subclass of a class of torch.nn overrides of that which manualgrad rebinds."""
    rebound = {
        name
        for base in _manual_class(torch_class).__mro__
        if base not in torch_class.__mro__
        for name, value in vars(base).items()
        if isinstance(value, (FunctionType, type))
    }
    defined = {name for base in cls.__mro__[: cls.__mro__.index(torch_class)] for name in vars(base)}
    return sorted(rebound & defined - {"__init__"})


# --- generated classes ---


class _GeneratedMeta(type):
    """The metaclass of generated classes. They are pickled by what they were generated from."""


class _NoSubclassHook(nn.Module):
    """The first base of generated classes: the ``__init_subclass__`` of a user's class is not called for them."""

    def __init_subclass__(cls) -> None:
        pass


_lock = RLock()
_BasesAndContents = tuple[tuple[type, ...], dict[str, Any]]


def _class_factory(make: Callable[..., _BasesAndContents]) -> Callable[..., Class]:
    """A function that generates a class, once for the same arguments. `make` returns its bases and contents."""

    @functools.cache
    def generate(*args: Any) -> Class:
        cls, (bases, contents) = args[0], make(*args)
        bases = bases if issubclass(cls, _NoSubclassHook) else (_NoSubclassHook, *bases)
        copied = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        copied |= {"_generated_from": (factory, args), "_note": "", **rebinding.REFUSES_SCRIPTING}
        return _metaclass(type(cls))(cls.__name__, bases, copied | contents)

    @functools.wraps(make)
    def factory(*args: Any) -> Class:
        with _lock:
            return generate(*args)

    return factory


@functools.cache
def _metaclass(user_metaclass: type) -> Any:
    """`_GeneratedMeta`, joined with the metaclass of a user's class."""
    if issubclass(user_metaclass, _GeneratedMeta):
        return user_metaclass
    found = _GeneratedMeta
    if user_metaclass is not type:
        found = type("_GeneratedMeta", (_GeneratedMeta, user_metaclass), {})
    copyreg.pickle(found, _reduce_class)  # pyright: ignore[reportArgumentType]
    return found


def _reduce_class(cls: Any) -> Any:
    # a class that is derived from a generated one is pickled by name
    return vars(cls).get("_generated_from", cls.__qualname__)


@_class_factory
def _with_manual_base(cls: Class) -> _BasesAndContents:
    """A user's subclass of a class of torch.nn, with the methods of manualgrad's class."""
    torch_class = next(base for base in cls.__mro__ if _manual_class(base) is not base)
    return (cls, _manual_class(torch_class)), {}


@_class_factory
def _with_override(cls: Class) -> _BasesAndContents:
    """A class with a forward that runs inside `override_torch_functions`."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with override_torch_functions():
            return cls.forward(self, *args, **kwargs)

    return (cls,), {"forward": forward, "_note": "its forward runs inside override_torch_functions()"}


@_class_factory
def _with_adapter(cls: Class, adapter: Callable[[Any, Tensor], Tensor]) -> _BasesAndContents:
    """A class with an adapter's forward."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return adapter(self, *args, *kwargs.values())

    return (cls,), {"forward": forward, "_note": f"its forward is {adapter.__module__}.{adapter.__qualname__}"}


_POOLS = tuple(
    getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for n in (1, 2, 3)
)


def _mask_saving_class(cls: Class) -> Class:
    """The class that saves a bit mask, for manualgrad's ReLU and LeakyReLU; any other class itself."""
    if cls is _manual_class(nn.ReLU):
        return _saving_mask(cls, _relu_with_mask)
    return _saving_mask(cls, _leaky_relu_with_mask) if cls is _manual_class(nn.LeakyReLU) else cls


def _relu_with_mask(self: Any, input: Tensor) -> Tensor:
    return relu_with_mask(input) if self.inplace else manual_functional.relu(input)


def _leaky_relu_with_mask(self: Any, input: Tensor) -> Tensor:
    if not self.inplace:
        return manual_functional.leaky_relu(input, self.negative_slope)
    return leaky_relu_with_mask(input, self.negative_slope)


@_class_factory
def _saving_mask(cls: Class, forward: Callable[..., Tensor]) -> _BasesAndContents:
    """An in-place activation before a pool."""
    return (cls,), {"forward": forward, "_note": "saves a bit mask, since the next pool does not save its input"}


def _fused_class(cls: Class, contents: Callable[[Class], dict[str, Any]]) -> Class:
    is_fused = vars(cls).get("_generated_from", (None,))[0] is _with_fused_loss
    return cls if is_fused else _with_fused_loss(cls, contents)


@_class_factory
def _with_fused_loss(cls: Class, contents: Callable[[Class], dict[str, Any]]) -> _BasesAndContents:
    """The class of a language model, or of its head, that computes the loss without logits."""
    return (cls,), contents(cls) | {"_note": "its loss is computed without logits"}


def _with_base(cls: Class, base: Class) -> Class:
    """A parametrized module's class with another base: the class that it was converted from, if that fits."""
    if base is cls.__bases__[0]:
        return cls
    before = vars(cls).get("_converted_from")
    if before and before.__bases__[0] is base and vars(before).keys() | {"_converted_from"} == vars(cls).keys():
        return before
    contents = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(base)
    return metaclass(cls.__name__, (base,), contents | {"_converted_from": cls})


# --- functions that modules hold ---

_FUNCTION = (FunctionType, BuiltinFunctionType)


@functools.cache
def _manual_functions() -> dict[Any, Any]:
    """By a function of torch.nn.functional, manualgrad's."""
    return {
        original: manual
        for name, manual in vars(manual_functional).items()
        if isinstance(original := getattr(F, name, None), _FUNCTION)
        and manual is not original
        and not name.startswith("_")
    }


@functools.cache
def _torch_functions() -> dict[Any, Any]:
    return {manual: original for original, manual in _manual_functions().items()}
