"""The page manualgrad/verification/README.md shows what the code does.

`python tests/test_verification_page.py` writes its generated parts again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from defects import other_checkers

from manualgrad import verify

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "manualgrad" / "verification" / "README.md"
TORCH_OF_PAGE = f"torch=={torch.__version__.partition('+')[0]}\n" in (ROOT / "constraints.txt").read_text()


def code(marker: str) -> str:
    (block,) = re.findall(rf"<!-- {marker} -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    return block


def run(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(source, namespace)
    return namespace


def example_output() -> str:
    with pytest.raises(AssertionError) as failure:
        run(code("example"))
    return f"```text\n{failure.value}\n```"


GENERATED = {"output": example_output, "laws": other_checkers.table}


def with_generated(page: str, marker: str) -> str:
    part = GENERATED[marker]()
    return re.sub(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{part}\n{m[2]}", page, flags=re.S)


@pytest.mark.filterwarnings("ignore:ctx.mark_dirty")
@pytest.mark.parametrize("marker", GENERATED)
def test_generated_part(marker: str) -> None:
    if marker == "laws" and not TORCH_OF_PAGE:
        pytest.skip("what torch's checkers find depends on the version of torch")
    page = PAGE.read_text()
    assert with_generated(page, marker) == page


def test_correct_example() -> None:
    x = run(code("example").partition("assert")[0])["x"]
    swish = run("import torch\nfrom torch.autograd import Function\n" + code("correct"))["Swish"]
    verify(swish, x).raise_if_failed()


def test_links() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


if __name__ == "__main__":
    page = PAGE.read_text()
    for marker in GENERATED:
        page = with_generated(page, marker)
    PAGE.write_text(page)
