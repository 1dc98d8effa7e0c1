"""Laws, their verdicts, and the report on a function."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from manualgrad.verification.function_under_test import FunctionUnderTest

HOLDS, FAILS, WARNING = "holds", "fails", "warning"
UNSUPPORTED, NOT_APPLICABLE = "unsupported", "not applicable"


class LawFailure(AssertionError):
    """The law does not hold.

    Args:
        evidence: what happened.
        likely_cause: replaces the law's usual cause.
    """

    def __init__(self, evidence: str, likely_cause: str = "") -> None:
        super().__init__(evidence)
        self.likely_cause = likely_cause


class LawWarning(Exception):
    """The law costs time or memory that could be saved, but no result is wrong."""


class Unsupported(Exception):
    """The function raises an error for an optional feature."""


class NotApplicable(Exception):
    """The law does not apply to this function, or cannot be tested on these inputs."""


@dataclass(frozen=True)
class Law:
    """A property of a correct autograd.Function, and the check that tests it."""

    name: str
    check: Callable[[FunctionUnderTest], None]
    property: str
    """The property, in one sentence."""
    motivation: str
    """Why the property matters."""
    likely_cause: str
    """What usually breaks it."""
    on_request: bool
    """Tested only if `verify` gets its name in `require` or `laws`."""


LAWS: dict[str, Law] = {}


def law(
    likely_cause: str, on_request: bool = False
) -> Callable[[Callable[[FunctionUnderTest], None]], Callable[[FunctionUnderTest], None]]:
    """Register a check as a law. Its docstring has two paragraphs: the property and the motivation."""

    def register(check: Callable[[FunctionUnderTest], None]) -> Callable[[FunctionUnderTest], None]:
        paragraphs = (inspect.getdoc(check) or "").split("\n\n")
        statement, motivation = (" ".join(paragraph.split()) for paragraph in paragraphs)
        name = check.__name__.rstrip("_")
        LAWS[name] = Law(name, check, statement, motivation, likely_cause, on_request)
        return check

    return register


@dataclass(frozen=True)
class LawResult:
    """The verdict on one law."""

    law: str
    verdict: str
    evidence: str = ""
    likely_cause: str = ""
    minimal_example: str = ""


@dataclass
class Report:
    """The results of `verify`. `str(report)` is a table."""

    name: str
    rows: list[LawResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No law failed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The names of the laws that failed."""
        return self._laws_with(FAILS)

    @property
    def warnings(self) -> list[str]:
        """The names of the laws that found wasted time or memory."""
        return self._laws_with(WARNING)

    def raise_if_failed(self) -> None:
        """Raise an AssertionError that lists the failed laws with evidence, likely cause and minimal example."""
        __tracebackhide__ = True
        if not self.ok:
            failed = [row for row in self.rows if row.verdict == FAILS]
            raise AssertionError(f"{self._summary()}\n\n{_table(failed)}")

    def to_json(self) -> str:
        summary = {"name": self.name, "ok": self.ok, "failures": self.failures, "warnings": self.warnings}
        return json.dumps({**summary, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def __str__(self) -> str:
        order = {FAILS: 0, WARNING: 1}
        return f"{self._summary()}\n\n{_table(sorted(self.rows, key=lambda row: order.get(row.verdict, 2)))}"

    def _laws_with(self, verdict: str) -> list[str]:
        return [row.law for row in self.rows if row.verdict == verdict]

    def _summary(self) -> str:
        failed, warned = len(self.failures), len(self.warnings)
        holding = len(self._laws_with(HOLDS))
        verdict = f"{failed or 'no'} {'laws fail' if failed > 1 else 'law fails'}"
        counts = [f"{holding} hold"]
        if warned:
            counts.append(f"{warned} warning{'s' if warned > 1 else ''}")
        counts.append(f"{len(self.rows) - failed - warned - holding} unsupported or not applicable")
        return f"{self.name}: {verdict} ({', '.join(counts)})"


def _table(rows: list[LawResult]) -> str:
    width = max((len(row.law) for row in rows), default=0)
    indent = " " * (width + 18)
    lines = []
    for row in rows:
        paragraphs = row.evidence.splitlines()
        if row.likely_cause:
            paragraphs.append(f"likely cause: {row.likely_cause}")
        if row.minimal_example:
            paragraphs.append(f"minimal example: {row.minimal_example}")
        text = [
            line
            for paragraph in paragraphs
            for line in textwrap.wrap(paragraph, 110 - len(indent), break_long_words=False)
        ]
        first, *others = text or [""]
        lines.append(f"{row.law:<{width}}  {row.verdict:<14}  {first}")
        lines += [indent + line for line in others]
    return "\n".join(line.rstrip() for line in lines)
