"""What the story, the chat and the exercises say, in English and in Korean.

`texts.txt` has each text in both languages, side by side. A measurement keeps no sentence, but a phrase:

    ["note recall", {"times": 256, "often": 1.0, "never": 0.05, "chance": 0.06}]      key, values

So a story that was measured once can be read in both languages. The gradient checker has English
sentences. `translated` finds them in the table. Not here: help texts and errors, which are English, and the
hints of the exercises in English, which stand in `check/exercises.py`.
"""

import re
import textwrap
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "ko")
FILLER = "\u2004"  # a narrow space, which no text has


@cache
def texts() -> dict[str, dict[str, str]]:
    """Key -> language -> text, of all of texts.txt."""
    content = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    entries = (re.split(r"\n(en|ko) ", entry) for entry in content.split("\n# ")[1:])
    pairs = {key: zip(rest[::2], rest[1::2], strict=True) for key, *rest in entries}
    return {key: {language: " ".join(text.split()) for language, text in pair} for key, pair in pairs.items()}


def text(language: str, key: str, **values) -> str:
    """The text of a key with its values. A value may be a phrase, or a list of phrases."""
    values = {name: spoken(language, value) for name, value in values.items()}
    return texts()[key][language].format(**values)


def spoken(language: str, item: object) -> object:
    """A phrase as text, phrases as texts with commas; a number, or a text of the world or a model, stays."""
    match item:
        case [str(key), dict(values)]:
            return text(language, key, **values)
        case [*items]:
            return ", ".join(spoken(language, each) for each in items)
    return item


def translated(language: str, sentence: str) -> str:
    """A sentence of the gradient checker in another language. The first text `checker ...` whose English
    fits decides. Its {values} are translated too; {name} has no space. Other sentences stay, as Python's."""
    for key, pair in texts().items():
        if key.startswith("checker ") and language != LANGUAGES[0]:
            pattern = re.escape(pair["en"]).replace(r"\ ", r"\s+").replace(r"\{name\}", r"(?P<name>\S+)")
            if fit := re.fullmatch(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", pattern), sentence):
                values = {name: translated(language, value) for name, value in fit.groupdict().items()}
                return text(language, key, **values)
    return sentence


def language_of(environment: Mapping[str, str]) -> str:
    """The language of a POSIX locale: the first of three variables that is set decides."""
    names = "LC_ALL", "LC_MESSAGES", "LANG"
    locale = next(filter(None, map(environment.get, names)), "")
    language = re.match("[a-z]*", locale)[0]
    return language if language in LANGUAGES else LANGUAGES[0]


# --- columns of a terminal ----------------------------------------------------------------------------------


def wide(text: str) -> str:
    """The text with FILLER after each character that takes two columns, such as Hangul.

    The length of the result is its width in columns: `format` and `textwrap` count right. `narrow` removes
    the FILLER.
    """
    return "".join(c + FILLER * (unicodedata.east_asian_width(c) in "WF") for c in text)


def narrow(text: str) -> str:
    return text.replace(FILLER, "")


def fill(text: str, width: int) -> str:
    """`textwrap.fill`, for a width in columns."""
    return narrow(textwrap.fill(wide(text), width))
