"""README.md says what the code does."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

from manualgrad.ops.linear import LinearFunction

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COVERAGE = (ROOT / "manualgrad" / "ops" / "COVERAGE.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_length() -> None:
    assert len(README.splitlines()) <= 200


def test_examples_print_what_is_shown(recwarn: pytest.WarningsRecorder) -> None:
    scope: dict[str, object] = {"__name__": "example"}
    examples = [block for block in blocks("python") if "class LinearFunction" not in block]
    printed = blocks("text")
    assert len(examples) == len(printed) == 3
    for code, expected in zip(examples, printed, strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, scope)
        assert output.getvalue().rstrip() == expected.rstrip()


def test_rule_shown_is_the_rule() -> None:
    """Up to the conjugates, which only complex numbers need."""
    shown = README[README.index("class LinearFunction") :]
    for name in ("forward", "grad_input", "grad_weight", "grad_bias"):
        body = inspect.getsource(getattr(LinearFunction, name)).splitlines()[-1].strip().replace(".conj()", "")
        assert body in shown


def test_table_of_orders_is_that_of_the_coverage_page() -> None:
    (rows,) = re.findall(r"<!-- python -m manualgrad coverage -->\n(.*?)<!-- end -->", README, re.S)
    assert rows in COVERAGE


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_commands(page: Path) -> None:
    if ".venv" in page.parts:
        pytest.skip("not of this project")
    text = page.read_text()
    for target in re.findall(r"\]\(([^)h#][^)#]*)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"python ((?:scripts|tests)/[a-z_]+\.py)", text):
        assert (ROOT / target).exists(), target
