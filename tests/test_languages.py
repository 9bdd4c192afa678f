"""Two pages in two languages say the same: sections, rows of tables, commands, numbers, links and pictures.

A page is a list of blocks. Each block of one page has its partner in the other page, at the same place: a
heading, a row of a table, an item of a list, a paragraph, a block of code. Words are free. Not compared: the
comments in code, which are translated, and the option --lang ko. Of an output in Korean the numbers count.
"""

import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

from tinygpt.lab import report, texts
from tinygpt.lab.story import STAGES

ROOT = Path(__file__).parents[1]
NUMBER = r"\d+(?:[.,:]\d+)*"
PAIRS = [("README.md", "README.ko.md"), ("demos/README.md", "demos/README.ko.md")]


class Block(NamedTuple):
    kind: str  # "## ", "|5" (a row of five cells), "- ", "code", "text"
    facts: Counter  # the block's code, numbers and links
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page in Markdown."""
    parts = re.split(r"(?ms)^(```.*?^```)$", page)
    return [block for n, part in enumerate(parts)
            for block in ([_code(part)] if n % 2 else map(_block, _paragraphs(part)))]  # fmt: skip


def _paragraphs(text: str) -> list[str]:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    starts = r"(?m)^(?=#|\||>|[-*] |\d+\. )|\n\s*\n"  # where a block begins, or a blank line
    return [" ".join(part.split()) for part in re.split(starts, text) if part and part.strip()]


def _code(text: str) -> Block:
    lines = (re.sub(r"(^|\s)#.*", "", line).rstrip().removesuffix(" --lang ko") for line in text.splitlines())
    return Block("code", Counter(line for line in lines if line), text)


def _block(text: str) -> Block:
    kind = re.match(r"#+ |\||> |[-*] |\d+\. |", text)[0] or "text"
    code = [span.replace(" --lang ko", "") for span in re.findall(r"`[^`]+`", text)]
    words = re.sub(r"`[^`]+`", "", text)
    links = [link.replace(".ko.", ".") for link in re.findall(r"\]\(([^)#]*)[^)]*\)", words)]
    words = re.sub(r"\]\([^)]*\)|^\d+\. ", "", words)
    numbers = [n.rstrip(",.") for n in re.findall(r"\.?\d[\d,.]*", words)]
    if kind == "|":
        kind += str(text.count("|") - text.count(r"\|") - 1)
    return Block(kind, Counter([*code, *links, *numbers]), text)


def differences(first: str, second: str) -> list[str]:
    """What one page has and the other has not, block by block. The list ends at a block without a partner."""
    problems = []
    for one, other in zip_longest(blocks(first), blocks(second)):
        if one is None or other is None or one.kind != other.kind:
            return [*problems, f"no partner: {one and one.text} / {other and other.text}"]
        here, there = one.facts, other.facts
        if one.kind == "code" and re.search("[가-힣]", "".join(there)):
            here, there = (Counter(re.findall(NUMBER, "\n".join(facts.elements())))
                           for facts in (here, there))  # fmt: skip
        if here != there:
            problems.append(f"only here: {[*(here - there)]}, only there: {[*(there - here)]}: "
                            f"{one.text} / {other.text}")  # fmt: skip
    return problems


@pytest.mark.parametrize("english, korean", PAIRS)
def test_the_languages_say_the_same(english: str, korean: str) -> None:
    first, second = ((ROOT / page).read_text(encoding="utf-8") for page in (english, korean))
    assert differences(first, second) == []


def test_the_figure_says_the_same_in_both_languages_and_has_the_story_of_the_readme() -> None:
    """Guards: a figure drawn anew for one language, or from another story than the README's table."""
    texts = [re.findall(r"<text[^>]*>(.*?)</text>", (ROOT / "demos" / name).read_text(encoding="utf-8"))
             for name in ("learning.svg", "learning.ko.svg")]  # fmt: skip
    english, korean = ([sorted(re.findall(r"\d(?:[\d,.]*\d)?", text)) for text in part] for part in texts)
    assert english == korean and len(english) > 30
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, change in re.findall(r"^(pre-training|RLHF) .*?([\d.]+)%", table, re.M):
        shown = f"{float(change):.0f}" if name == "pre-training" else change
        assert f"weights move by {shown}%" in texts[0], (name, change)
    lora, ptuning = (re.search(rf"^{name} .*? (\d+,\d+) +0", table, re.M)[1] for name in ("LoRA", "p-tuning"))
    assert f"trained: {lora}, {ptuning} weights" in texts[0]


def test_the_korean_table_is_that_of_the_story() -> None:
    """Guards: other names of columns and stages than the story prints."""
    page = (ROOT / "README.ko.md").read_text(encoding="utf-8")
    heads, stages = ([texts.text("ko", name) for name in names] for names in (report.HEADS, STAGES))
    head, *rows = re.search(rf"(?ms)^{heads[0]} .*?\n\n", page)[0].splitlines()
    assert head.split() == " ".join(heads).split()
    assert len(rows) == len(stages) + 1 and all(map(str.startswith, rows, stages))
    legend = re.search(r"(?ms)^\| 열 \|.*?\n\n", page)[0]
    columns = ", ".join(re.findall(r"(?m)^\| ([^|]+) \|", legend)[1:]).split(", ")
    assert columns == heads[2:]


PAGE = """# One
[한국어](README.ko.md) Two words, 3 numbers, `code`.

| a | 1,000 |
|---|---|
| b | .5 and 98.5 % |

- a point
```
tinygpt story  # a comment
```

```
3 stages took 1:05
```
"""


@pytest.mark.parametrize("change", [
    ("# One", "## One"), ("3 numbers", "4 numbers"), ("`code`", "`cod`"), ("| b | .5", "| b | c | .5"),
    ("98.5 %", "98.6 %"), ("| b | .5 and 98.5 % |\n", ""), ("- a point", "a point"), ("README.ko", "REAMDE"),
    ("tinygpt story", "tinygpt stroy"), ("| a | 1,000 |", "| a | 1000 |"), ("- a point\n", ""),
    ("took 1:05", "took 1:06"),
])  # fmt: skip
def test_a_difference_is_seen(change: tuple[str, str]) -> None:
    other = PAGE.replace("a comment", "설명").replace("README.ko.md", "README.md")
    other = other.replace("gpt story", "gpt story --lang ko").replace("3 stages took", "3단계에 걸린 시간:")
    assert differences(PAGE, other) == []
    assert change[0] in PAGE and differences(PAGE.replace(*change), other)
