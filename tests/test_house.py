"""The house: which folder may import which, names, and the picture of it in demos/house.md."""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [("core", "files"), ("text",), ("world",), ("stages",), ("folders",), ("lab", "check"), ("shell",)]
FLOOR = {folder: n for n, folders in enumerate(FLOORS) for folder in folders}

pytestmark = pytest.mark.skipif(not (ROOT / "tinygpt").exists(), reason="needs the sources")


def modules() -> list[Path]:
    return [path for path in (ROOT / "tinygpt").rglob("*.py") if path.parent != ROOT / "tinygpt"]


def imports(path: Path) -> set[str]:
    """The folders of tinygpt that a module imports from, also within functions."""
    folders, package = set(), ("tinygpt", path.parent.name)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            folders |= {(*base, *name.split("."))[1] for name in names}
    return folders


def test_imports_point_one_way():
    """A module imports from its own folder and from those below; of the top, only what needs no other module.
    Nobody but the shell imports `check`."""
    for path in modules():
        own = path.parent.name
        for folder in imports(path) - {own, "errors", "launch", "_core", "__version__"}:
            assert FLOOR[folder] < FLOOR[own], f"{path} imports {folder}"
            assert folder != "check" or own == "shell", f"{path} imports {folder}"


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in modules() if path.stem != "__init__")
    assert max(names.values()) == 1, names.most_common(3)


def test_a_page_shows_the_house():
    """One caption for each file, and the true number of lines to read."""
    text = (ROOT / "demos" / "house.md").read_text(encoding="utf-8")
    tree = text[text.index("```\ntinygpt/\n") :].split("```")[1]
    folder, shown = "", {}
    for line in tree.splitlines():
        if match := re.fullmatch(r"  (\w+)/ +(\S.*)", line):
            folder = match[1]
        elif match := re.fullmatch(r"    (\w+\.py) +(\S.*)", line):
            shown[f"{folder}/{match[1]}"] = match[2]
    assert set(shown) == {f"{p.parent.name}/{p.name}" for p in modules() if p.stem != "__init__"}
    lines = sum(code_lines(path) for path in modules() if path.parent.name == "core")
    assert f"{lines:,} lines of code" in text
    assert f"{lines:,} lines of code" in (ROOT / "README.md").read_text(encoding="utf-8")


def code_lines(path: Path) -> int:
    """Lines without blanks, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    names = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
    kinds = [getattr(tokenize, name) for name in names]
    tokens = (t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in kinds)
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)
