"""The words that people read: short sentences, and none that ends in a preposition.

    python tests/test_words.py [PART OF A PATH ...]      lists what is wrong, of all places or of these

Many readers read English second. The places are README.md, the pages and the demos in demos/, every docstring
of tinygpt/, `lab/texts.txt`, and what `--help` prints. A piece of code counts as one word. Indented blocks
are code, formulas.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tinygpt.lab.texts import texts as table
from tinygpt.shell.cli import main

ROOT = Path(__file__).parents[1]
MOST = 28  # words of a sentence
PREPOSITIONS = {
    "about", "above", "after", "against", "at", "before", "below", "beside", "between", "beyond", "by", "for",
    "from", "in", "into", "of", "off", "on", "onto", "over", "through", "to", "toward", "under", "until",
    "upon", "with", "within", "without",
}  # fmt: skip
EXCEPTIONS = ()  # sentences that stay as they are: where each begins


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page or a docstring: of its paragraphs, items of lists, cells of tables."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.S)
    text = re.sub(r"``[^`]+``|`[^`]+`", "Code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^( {4,}.*|#.*|[|:\- ]+)$", "", text, flags=re.M)
    text = re.sub(r"^ *(?:[-*]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"^\|(.*)\|$", lambda row: "\n\n" + row[1].replace("|", "\n\n") + "\n\n", text, flags=re.M)
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        yield from (s for s in re.split(r"(?<=[.?!])[)\"*]* (?=[^a-z])", paragraph) if s)


def problem(sentence: str) -> str | None:
    """What is wrong with a sentence, or None."""
    if sentence.startswith(EXCEPTIONS):
        return None
    words = re.findall(r"[^\W_][\w'’.,-]*", sentence)
    if len(words) > MOST:
        return f"{len(words)} words"
    last = words[-1].strip(".,").lower() if words else ""
    return f"ends in {last!r}" if last in PREPOSITIONS and len(words) > 1 and sentence[-1] in ".?!" else None


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and (text := ast.get_docstring(node)):
            yield f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}", text


def helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.opts[0]}", getattr(parameter, "help", None) or ""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in command.list_commands(context):
            yield from helps(command.get_command(context, sub), f"{name} {sub}")


def texts() -> Iterator[tuple[str, str]]:
    """(place, text) of all that people read in English."""
    for page in [ROOT / "README.md", *sorted((ROOT / "demos").glob("*.md"))]:
        if not page.stem.endswith(".ko"):
            yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for file in sorted([*(ROOT / "tinygpt").rglob("*.py"), *(ROOT / "demos").glob("*.py")]):
        yield from docstrings(file)
    yield from helps(main, "tinygpt")
    yield from ((f"texts.txt: {key}", pair["en"]) for key, pair in table().items() if "en" in pair)


def problems(*parts: str) -> list[str]:
    return [f"{place}: {reason}: {sentence}" for place, text in texts()
            if not parts or any(part in place for part in parts)
            for sentence in sentences(text) if (reason := problem(sentence))]  # fmt: skip


@pytest.mark.parametrize("sentence, reason", [
    ("The head reads " + "a word, " * 10 + "and stops.", None),
    ("The head reads " + "one more word " * 9 + "and then stops.", "33 words"),
    ("Here is the model that the tokens come from.", "ends in 'from'"),
    ("`from`", None),
])  # fmt: skip
def test_a_problem_is_seen(sentence: str, reason: str | None) -> None:
    (only,) = sentences(sentence)
    assert (problem(only) or "").startswith(reason or "") and bool(problem(only)) == bool(reason)


def test_all_sentences_are_short() -> None:
    assert problems() == []


if __name__ == "__main__":
    print("\n".join(problems(*sys.argv[1:])))
