"""python -m manualgrad show [NAME], coverage [NAME ...], or verify PACKAGE.MODULE:FUNCTION --inputs ..."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from manualgrad import coverage
from manualgrad.registry import ops
from manualgrad.show import catalog, show
from manualgrad.verification import LAWS, verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m manualgrad", description="Gradients by hand.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("show", help="the gradient of an operation: derivation, formulas, program")
    text.add_argument("name", nargs="?", metavar="NAME", help="a function or a module of torch.nn; none: list all")
    text.add_argument("--standalone", action="store_true", help="as a Python file that imports only torch")
    page = commands.add_parser("coverage", help="every name of torch.nn with what is known of its gradient")
    page.add_argument("names", nargs="*", metavar="NAME", help="only these functions")
    check = commands.add_parser(
        "verify",
        help="try every law on a function",
        description="Exit status: 0 sound, 1 a law fails, 2 it could not be tried.",
    )
    check.add_argument("function", metavar="PACKAGE.MODULE:NAME", help="a Function, function or module")
    check.add_argument(
        "--inputs", required=True, metavar="PACKAGE.MODULE:NAME", help="makes the inputs: one, or a tuple"
    )
    check.add_argument("--reference", metavar="PACKAGE.MODULE:NAME", help="a plain implementation")
    check.add_argument(
        "--require", nargs="*", default=[], metavar="LAW", help=f"that must hold: {', '.join(LAWS)}"
    )
    check.add_argument("--laws", nargs="*", metavar="LAW", help="only these")
    check.add_argument("--surrogate", action="store_true", help="the gradient is by definition not the derivative")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    if given.command == "show":
        return _show(given.name, given.standalone)
    if given.command == "coverage":
        return _coverage(given.names)
    try:
        inputs = _named(given.inputs)()
        report = verify(
            _named(given.function),
            *(inputs if isinstance(inputs, tuple) else (inputs,)),
            reference=None if given.reference is None else _named(given.reference),
            require=given.require,
            laws=given.laws,
            surrogate=given.surrogate,
        )
    except Exception as error:
        print(f"{parser.prog} verify: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report.to_json() if given.json else report)
    return 0 if report.ok else 1


def _show(name: str | None, standalone: bool) -> int:
    try:
        print(catalog() if name is None else show(name, standalone=standalone))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _coverage(names: list[str]) -> int:
    for name in set(names) - ops().keys():
        print(f"no function is called {name!r}", file=sys.stderr)
        return 2
    print(coverage.HEAD)
    marks = []
    for op in ops().values():
        if not names or op.name in names:
            row = coverage.row(op)
            marks.append((row.orders, row.orders_of_torch))
            print(row, flush=True)
    if not names:
        print(f"\n{coverage.summary(marks)}")
    if absent := coverage.missing():
        print(f"\nNot derived: {', '.join(absent)}")
    return 1 if absent else 0


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} does not name anything: write package.module:name")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    sys.exit(main())
