#!/usr/bin/env python3
"""Run the tests on every supported version of torch, each in a fresh virtual environment.

    python scripts/check_versions.py                                            all versions
    python scripts/check_versions.py 2.14.1 --pytest "tests/test_nn.py -n 2"    one version, one file
    python scripts/check_versions.py --pip "--extra-index-url https://download.pytorch.org/whl/cpu transformers"

On Linux, torch from PyPI includes CUDA: about 3 GB per version. The extra index in the third command has torch for
the CPU, which pip prefers. Other packages have the versions in constraints.txt. The output ends with a table.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from manualgrad.torch_internals import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("passed", "failed", "error", "xfailed", "skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "versions",
        nargs="*",
        default=TESTED_VERSIONS,
        help="versions of torch, such as 2.14.1 (default: all)",
    )
    parser.add_argument("--pip", default="", help="additional options or packages for pip")
    parser.add_argument("--pytest", default="", help="additional options or files for pytest")
    settings = parser.parse_args()
    failed, table = False, []
    for version in settings.versions:
        start = time.perf_counter()
        try:
            counts = run_tests(version, shlex.split(settings.pip), shlex.split(settings.pytest))
        except subprocess.CalledProcessError as error:
            counts = {"error": 1}
            print(f"torch {version}: {error}", file=sys.stderr)
        failed |= bool(counts.get("failed") or counts.get("error") or not counts.get("passed"))
        table.append([version, *(counts.get(name, 0) for name in COUNTS), round(time.perf_counter() - start)])
    for row in (("torch", *COUNTS, "seconds"), ["---"] * (len(COUNTS) + 2), *table):
        print("|", " | ".join(map(str, row)), "|")
    return int(failed)


def run_tests(version: str, pip: list[str], pytest: list[str]) -> dict[str, int]:
    """Run the tests with a version of torch. Return how many passed, failed and so on."""
    with tempfile.TemporaryDirectory(prefix=f"torch-{version}-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        constraints = folder / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
        packages = [f"torch=={version}", "-e", f"{ROOT}[dev]", *pip]
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *packages], check=True)
        command = [python, "-m", "pytest", "-n", "auto", "-p", "no:cacheprovider", *pytest]
        last = ""
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last = line if line.strip() else last
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+?)s?\b", last)}
        if process.returncode not in (0, 1):  # pytest did not finish
            counts["error"] = counts.get("error", 0) + 1
        return counts


if __name__ == "__main__":
    sys.exit(main())
