"""What a law is, and what is reported of it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from manualgrad.verification.subject import Subject

HOLDS, FAILS, NOT_OFFERED, NOT_APPLICABLE = "holds", "fails", "not offered", "not applicable"


class Fails(AssertionError):
    """The law is broken: the evidence, and what usually causes it where that is not what the law says."""

    def __init__(self, evidence: str, cause: str = "") -> None:
        super().__init__(evidence)
        self.cause = cause


class Wastes(Exception):
    """The law holds, at a price that need not be paid."""


class NotOffered(Exception):
    """An optional capability that the function does not have, and says so aloud."""


class NotApplicable(Exception):
    """The law says nothing about this function, or nothing can be told here."""


@dataclass(frozen=True)
class Law:
    """One thing that is true of a sound function."""

    name: str
    check: Callable[[Subject], None]
    states: str
    cause: str
    on_request: bool


LAWS: dict[str, Law] = {}


def law(cause: str, on_request: bool = False) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a function into the table of laws. Its docstring states the law, `cause` what usually breaks it."""

    def enter(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        states = " ".join((check.__doc__ or "").split())
        name = check.__name__.rstrip("_")
        LAWS[name] = Law(name, check, states, cause, on_request)
        return check

    return enter


@dataclass(frozen=True)
class Row:
    """One law's verdict. A law that holds with evidence holds at a price: a warning."""

    law: str
    verdict: str
    evidence: str = ""
    cause: str = ""
    minimal_example: str = ""


@dataclass
class Report:
    """What `verify` found, law by law."""

    name: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No law failed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The names of the laws that failed."""
        return [row.law for row in self.rows if row.verdict == FAILS]

    @property
    def warnings(self) -> list[str]:
        """The names of the laws that hold at a price."""
        return [row.law for row in self.rows if row.verdict == HOLDS and row.evidence]

    def raise_if_failed(self) -> None:
        """AssertionError with the failed laws, their evidence and the smallest input that shows each."""
        __tracebackhide__ = True
        if not self.ok:
            raise AssertionError(
                f"{self._summary()}\n\n{self._table([r for r in self.rows if r.verdict == FAILS])}"
            )

    def to_json(self) -> str:
        shown = {"name": self.name, "ok": self.ok, "failures": self.failures, "warnings": self.warnings}
        return json.dumps({**shown, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def __str__(self) -> str:
        shown = sorted(
            self.rows, key=lambda row: (row.verdict != FAILS, not (row.verdict == HOLDS and row.evidence))
        )
        return f"{self._summary()}\n\n{self._table(shown)}"

    def _summary(self) -> str:
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in (FAILS, HOLDS)}
        said = "sound" if self.ok else f"{count[FAILS]} {'law fails' if count[FAILS] == 1 else 'laws fail'}"
        warned = f", {len(self.warnings)} with a warning" if self.warnings else ""
        silent = len(self.rows) - sum(count.values())
        return f"{self.name}: {said} ({count[HOLDS]} hold{warned}, {silent} not offered or not applicable)"

    def _table(self, rows: list[Row]) -> str:
        wide = max((len(row.law) for row in rows), default=0)
        lines = []
        for row in rows:
            warned = row.verdict == HOLDS and row.evidence
            verdict = "warning" if warned else row.verdict
            more = [row.evidence]
            if row.cause:
                more.append(f"usually: {row.cause}")
            if row.minimal_example:
                more.append(f"minimal example: {row.minimal_example}")
            indent = " " * (wide + 18)
            text = [
                line
                for part in more
                for paragraph in part.splitlines()
                for line in textwrap.wrap(paragraph, 110 - len(indent), break_long_words=False)
            ]
            head = f"{row.law:<{wide}}  {verdict:<14}"
            lines.append(head + ("  " + text[0] if text else ""))
            lines += [indent + line for line in text[1:]]
        return "\n".join(line.rstrip() for line in lines)
