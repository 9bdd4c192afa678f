"""The README's code: it is that of ops.py, and it runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "tinygpt").exists(), reason="needs the sources")


def block(mark: str) -> str:
    """The code below a mark."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", readme, re.DOTALL)[1]


def test_the_operation_is_that_of_the_textbook():
    """Guards: code in the README that the textbook no longer has."""
    source = iter((ROOT / "tinygpt" / "core" / "ops.py").read_text(encoding="utf-8").splitlines())
    for line in filter(None, block("from ops.py").splitlines()):
        begin = line.partition("(")[0] if line.startswith("def ") else line
        assert any(other.startswith(begin) for other in source), line


def test_the_quick_start_learns_its_text():
    code = block("quick start")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = re.search(r"^print.*# (.*)$", code, re.MULTILINE)[1]
    assert run.stdout.strip() == expected
