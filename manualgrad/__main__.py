"""python -m manualgrad show, export, verify or coverage. ``--help`` describes each."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch

from manualgrad import coverage
from manualgrad.program import export
from manualgrad.show import list_operations, show
from manualgrad.verification import LAWS, verify


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.command == "show":
        return _show(options.name, options.standalone)
    if options.command == "coverage":
        return coverage.main(options.names)
    try:
        return _export(options) if options.command == "export" else _verify(options)
    except Exception as error:
        print(f"{parser.prog} {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m manualgrad", description="Hand-derived gradients for torch.nn."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print derivation, formulas and generated backward of an operation")
    show.add_argument("name", nargs="?", metavar="NAME", help="function or module of torch.nn (default: list all)")
    show.add_argument("--standalone", action="store_true", help="print a Python file that imports only torch")
    coverage = commands.add_parser("coverage", help="print the coverage table of torch.nn")
    coverage.add_argument("names", nargs="*", metavar="NAME", help="only these functions")
    export = commands.add_parser("export", help="write a model's forward and backward as one Python file")
    export.add_argument("model", metavar="PACKAGE.MODULE:NAME", help="a model, or a function that returns one")
    export.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE[:DTYPE]",
        help="an input of random numbers, for example 64,3,32,32 or 8,128:int64; once for each input",
    )
    export.add_argument("--memory", choices=("eager", "least"), default="eager", help="what is computed again")
    export.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: print it)")
    verify = commands.add_parser(
        "verify",
        help="check a Function, function or module against all laws",
        description="Exit status: 0 all laws hold, 1 a law fails, 2 the function could not be checked.",
    )
    verify.add_argument("function", metavar="PACKAGE.MODULE:NAME", help="a Function, function or module")
    verify.add_argument(
        "--inputs",
        required=True,
        metavar="PACKAGE.MODULE:NAME",
        help="a function that returns an input or a tuple",
    )
    verify.add_argument("--reference", metavar="PACKAGE.MODULE:NAME", help="a plain implementation")
    verify.add_argument(
        "--require", nargs="*", default=[], metavar="LAW", help=f"laws that must hold: {', '.join(LAWS)}"
    )
    verify.add_argument("--laws", nargs="*", metavar="LAW", help="check only these laws")
    verify.add_argument("--surrogate", action="store_true", help="the gradient is not meant to be the derivative")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _show(name: str | None, standalone: bool) -> int:
    try:
        print(list_operations() if name is None else show(name, standalone=standalone))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _verify(options: argparse.Namespace) -> int:
    inputs = _import_object(options.inputs)()
    report = verify(
        _import_object(options.function),
        *(inputs if isinstance(inputs, tuple) else (inputs,)),
        reference=None if options.reference is None else _import_object(options.reference),
        require=options.require,
        laws=options.laws,
        surrogate=options.surrogate,
    )
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _export(options: argparse.Namespace) -> int:
    model = _import_object(options.model)
    model = model if isinstance(model, torch.nn.Module) else model()
    program = export(model, tuple(map(_example_input, options.input)), memory=options.memory)
    if options.output is None:
        print(program.code, end="")
    else:
        program.save(options.output)
    return 0


def _example_input(text: str) -> torch.Tensor:
    sizes, _, name = text.partition(":")
    shape = [int(x) for x in sizes.split(",") if x]
    dtype = getattr(torch, name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}")
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _import_object(path: str) -> Any:
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"expected PACKAGE.MODULE:NAME, but got {path!r}")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    sys.exit(main())
