"""The texts in two languages: the same values and numbers, columns that line up, English as it was."""

import inspect
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tinygpt.check import exercises
from tinygpt.core import kernels
from tinygpt.lab import story, texts
from tinygpt.shell.cli import main

GOLDEN = Path(__file__).parent / "golden" / "story.txt"
ENGLISH = re.compile(r"[A-Za-z][a-z]+(?: [a-z]+){2,}")  # three words
HANGUL, TIME = re.compile("[가-힣]"), re.compile(r"\d+:\d\d")


def results() -> dict[str, dict]:
    """A result for each stage of a story, made up, with all that a page needs."""
    rates = {"form": 1.0, "known": 0.92, "falsehoods": 0.78, "reasoning": 1.0, "few-shot": 0.86}
    pairs, prompt = ["data pairs", {"count": 5400}], ["data prompt", {}]
    sample = ["Who?", "Ann", "Bob.", "Bob."]

    def row(data: list, weights: int, change: float, base: bool, **others) -> dict:
        return {"data": data, "weights": weights, "change": change, "base": base, **others}

    curves = {"update": [1, 2], "loss": [7.0, 2.0], "told": [0.0, 256.0], "recalled": [0.0, 1.0]}
    steered = {name: [0.0, 1.0] for name in ("iter", "reward", "gold", "kl", "entropy")}
    kinds = ["right over wrong", "right over don't know", "right over garbled", "don't know over wrong",
             "don't know over garbled"]  # fmt: skip
    return {
        "pre-training": {
            "row": row(["data text", {"millions": 4.7}], 1_010_816, 2.383, True, seconds=89.0, **rates),
            "samples": [sample], "curves": curves, "floor": 1.0, "change": {"wte.weight": 2.0},
            "notes": [["note floor", {"gap": 0.026}],
                      ["note recall", {"times": 256.0, "often": 1.0, "never": 0.05, "chance": 0.04}]],
        },
        "in-context learning": {
            "row": row(prompt, 0, 0.0, True, summary=["shown examples", {"none": 0.07, "eight": 0.88}]),
            "samples": [["hat", ["without examples", {"answer": "tove"}], "rulo", "rulo"]],
            "curves": {"shots": [0, 8], "best possible": [0.06, 0.91], "100%": [0.07, 0.88]},
            "head": {"layer": 1, "head": 2, "tokens": [" hat", " cat"], "map": [[1, 0], [0.5, 0.5]]},
            "notes": [["note examples", {"right": "7%, 88%", "best": "6%, 91%"}]],
        },
        "instruction tuning": {"row": row(pairs, 1_010_816, 0.137, False, seconds=15.0, **rates),
                               "change": {"wte.weight": 0.1}, "samples": [sample]},
        "without chain of thought": {
            "row": row(["data answers", {"count": 1000}], 1_010_816, 0.095, False, reasoning=0.06),
            "samples": [sample], "compares": ["at once", "step by step"],
        },
        "reward model": {
            "row": row(["data comparisons", {"count": 20_000}], 1_010_944, 0.047, False, seconds=19.0,
                       summary=["shown judge", {"right": 0.9}]),
            "notes": [["note judge", {"right": 0.9, "kinds": [[kind, {"rate": 0.9}] for kind in kinds]}]],
        },
        "RLHF": {"row": row(["data own", {}], 1_010_816, 0.004, False, **rates), "curves": steered},
        "LoRA": {"row": row(pairs, 32_768, 0.0, True, seconds=15.0, **rates)},
        "p-tuning": {"failed": "ValueError: no such thing"},
        "two memories": {
            "row": row(prompt, 0, 0.0, True, summary=["shown prompt", {"right": 1.0}]),
            "heads": ["1.2"], "alone": {"1.2": 0.1, "1.3": 0.8},
            "notes": [["note contradiction", {"prompt": 1.0, "weights": 0.0}],
                      ["note heads", {"right": 1.0, "count": 4, "cut": 0.06}],
                      ["note one head", {"layer": 0, "head": 3, "worst": 0.3, "back": 0.9, "others": 0.8}]],
        },
    }  # fmt: skip


@pytest.fixture
def told(tmp_path, monkeypatch, toy):
    """A function that tells this story in a language: the output and the page."""
    made = results()

    def measured(name: str):
        def measure(lab) -> dict:
            if "failed" in made[name]:
                raise ValueError("no such thing")
            return json.loads(json.dumps(made[name]))

        return measure

    assert list(made) == list(story.STAGES)
    monkeypatch.setattr(story, "STAGES", {name: measured(name) for name in made})
    monkeypatch.chdir(tmp_path)

    def tell(*options: str, **environment: str) -> tuple[str, str]:
        environment = {"LC_ALL": None, "LC_MESSAGES": None, "LANG": None} | environment
        command = ["story", "--seed", "5", "--out", "it", *options]
        result = CliRunner().invoke(main, command, obj=toy, env=environment)
        assert result.exit_code == 1, result.output  # one stage failed
        return result.output, Path("it/report.html").read_text(encoding="utf-8")

    return tell


def width(text: str) -> int:
    """Columns of a terminal."""
    return len(text) + len(HANGUL.findall(text))


def columns(line: str) -> list[int]:
    """Where the words of a line begin, in columns of a terminal."""
    return [width(line[: match.start()]) for match in re.finditer(r"(?<!\S)\S", line)]


@pytest.mark.skipif("c" not in kernels.available(), reason="NumPy rounds otherwise, and a line says so")
def test_english_keeps_its_bytes(told):
    """Guards: a text that is not what it was before it had a second language."""
    output, page = told()
    assert TIME.sub("0:00", output) == GOLDEN.read_text(encoding="utf-8")
    assert '<html lang="en">' in page
    assert not HANGUL.search(re.sub("<small>.*?</small>", "", page))  # the terms


def test_a_story_in_korean_has_no_english_sentence(told):
    """Guards: a text without a language, a term without its other name, an axis in English."""
    output, page = told("--lang", "ko")
    terms = [texts.text("ko", f"{name}, term") for name in story.STAGES]
    lines = [line for line in output.splitlines() if not line.startswith("  ")]  # samples are of the world
    shown = re.findall(r"<(?:p|h1|h2|th|title)>(.*?)</|<text [^>]*>(.*?)</text>", page, flags=re.S)
    assert len(lines) > 40 and len(shown) > 60
    for line in [*lines, *map("".join, shown)]:
        for term in [*terms, "induction head", "chain of thought", "ValueError: no such thing"]:
            line = line.replace(term, "")
        assert not ENGLISH.search(line), line
    for name in ("사전 훈련 (사전학습)", "세부 훈련", "미세조정", "문맥 학습 (문맥 내 학습)", "영어로 되어"):
        assert name in output
    assert '<html lang="ko">' in page and texts.FILLER not in output + page
    assert output.rstrip().endswith("--compare base,sft,rlhf --lang ko")


def test_numbers_are_the_same_in_both_languages(told):
    english, korean = (re.findall(r"\d+(?:[.,]\d+)*", TIME.sub("", told("--lang", language)[0]))
                       for language in texts.LANGUAGES)  # fmt: skip
    assert sorted(english) == sorted(korean)


@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_columns_line_up(told, language):
    """Guards: a column that counts Hangul as one cell wide."""
    lines = told("--lang", language)[0].splitlines()
    stage, intact = (texts.text(language, name) for name in ("stage", "base intact"))
    (first,) = (n for n, line in enumerate(lines) if line.startswith(f"{stage} "))
    head, *rows = lines[first : first + 1 + len(story.STAGES)]
    starts = [columns(row)[-1] for name, row in zip(story.STAGES, rows, strict=True) if name != "p-tuning"]
    assert set(starts) == {columns(head[: head.index(intact) + 1])[-1]}
    prose = [*lines[:first], *lines[first + 1 + len(rows) :]]
    assert all(width(line) <= 110 for line in prose if " it" not in line and "it/" not in line)


@pytest.mark.skipif("c" not in kernels.available(), reason="NumPy rounds otherwise, and a line says so")
@pytest.mark.parametrize(
    ("environment", "names_it"),
    [
        ({"LANG": "ko_KR.UTF-8"}, True),
        ({"LC_MESSAGES": "ko_KR", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "ko_KR.UTF-8"}, False),
        ({"LC_ALL": "", "LANG": "ko"}, True),
        ({"LANG": "kok_IN"}, False),
        ({"LANG": "en_US.UTF-8"}, False),
        ({}, False),
    ],
)
def test_a_korean_locale_gets_one_line(told, environment, names_it):
    line = texts.text("ko", "language") + "\n"
    output, _ = told(**environment)
    assert output.count("--lang ko") == output.count(line) == names_it
    assert TIME.sub("0:00", output.replace(line, "")) == GOLDEN.read_text(encoding="utf-8")
    assert line not in told("--lang", "en", **environment)[0]


def values(text: str) -> list[str]:
    return sorted(re.findall(r"{.*?}", text))


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", re.sub(r"{.*?}", "", text)))


def test_both_languages_say_the_same():
    for key, pair in texts.texts().items():
        if "en" not in pair:
            assert key == "language" or key.startswith("exercise "), key
            assert list(pair) == ["ko"], key
            continue
        assert list(pair) == list(texts.LANGUAGES), key
        assert values(pair["en"]) == values(pair["ko"]) and numbers(pair["en"]) == numbers(pair["ko"]), key


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_an_exercise_in_korean(name, tmp_path, monkeypatch):
    """Guards: another task than the English one, a hint that was lost, code that changed."""
    monkeypatch.chdir(tmp_path)
    for language in texts.LANGUAGES:
        command = ["exercise", name, "--out", f"{language}.py", "--lang", language]
        assert CliRunner().invoke(main, command).exit_code == 0
    english, korean = (Path(f"{language}.py").read_text(encoding="utf-8") for language in texts.LANGUAGES)
    (hint,) = re.findall(r"    Hint: (.*?)\n    \"{3}", english, flags=re.S)
    (translated,) = re.findall(r"    힌트: (.*?)\n    \"{3}", korean, flags=re.S)
    assert numbers(hint) == numbers(translated) and not ENGLISH.search(translated.replace("et al.", ""))
    about, translated = (re.findall(rf'def {name}_forward.*?"{{3}}(.*?)"{{3}}', text, flags=re.S)[0]
                         for text in (english, korean))  # fmt: skip
    assert numbers(about) == numbers(translated)
    assert not ENGLISH.search(translated.replace("advantage log p", "").replace("et al.", ""))
    assert hint in inspect.getsource(getattr(exercises, exercises.blank(name)))
    head, rest = korean.split('\n"""\n', 1)
    assert not ENGLISH.search(head.replace(f"tinygpt exercise {name}", ""))
    assert exercises.EXERCISES[name][1].split(", ")[0] in head
    code = re.compile(r'""".*?"""|#[^\n]*', re.S)
    assert code.sub("", rest) == code.sub("", english.split('\n"""\n', 1)[1])
    words = " ".join(code.findall(rest)).replace("et al.", "")
    assert not re.search(r"\b(the|is|are|of|and|with|each|for|has|gets?|no|a \w{3,})\b", words), words


def test_the_code_of_the_exercises_has_each_english_text():
    """Guards: a translation that waits for a comment that was changed."""
    source = inspect.getsource(exercises)
    assert all(pair["en"] in source for key, pair in texts.texts().items() if key.startswith("code "))


WRONG = "    return dout @ w.T, 2 * x.T @ dout, dout\n"


def test_a_grade_in_korean(tmp_path, monkeypatch):
    """Guards: a verdict in English; a command that forgets the language; JSON with other words."""
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(main, ["exercise", "linear", "--lang", "ko"])
    assert made.stdout.endswith("--check my_linear.py --lang ko\n")
    check, file = ["exercise", "linear", "--check", "my_linear.py"], Path("my_linear.py")
    blank = CliRunner().invoke(main, [*check, "--lang", "ko"])
    assert blank.exit_code == 1 and blank.stdout.startswith("틀림 linear_backward: backward가 None을")
    source = re.sub("    # 여기에 .*\n", WRONG, file.read_text(encoding="utf-8"))
    file.write_text(source, encoding="utf-8")
    wrong = CliRunner().invoke(main, [*check, "--lang", "ko"])
    assert wrong.exit_code == 1 and not ENGLISH.search(wrong.stdout)
    right, factor, likely, shape, total = wrong.stdout.splitlines()
    assert right.startswith("맞음 dx: 상대 오차 ") and factor.startswith("틀림 dw: 상대 오차 5.0e-01, 위치 [")
    assert likely == "짐작: 맞는 값의 2배입니다" and shape.startswith("틀림 db: 모양이 (5, 3)입니다.")
    assert total == "짐작: 축 0에 대한 합이 빠졌습니다"
    folder = CliRunner().invoke(main, ["exercise", "linear", "--check", ".", "--lang", "ko"])
    assert folder.stdout.startswith("틀림 my_linear.py  db: 모양이")
    korean, english = (CliRunner().invoke(main, [*check, "--json", *lang], env={"LANG": "ko_KR.UTF-8"}).output
                       for lang in (["--lang", "ko"], []))  # fmt: skip
    assert korean == english and json.loads(english)[1]["diagnosis"] == "it is 2 times the right one"


def test_the_list_of_exercises_in_korean():
    result = CliRunner().invoke(main, ["exercise", "--lang", "ko"])
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[: len(exercises.EXERCISES)]] == list(exercises.EXERCISES)
    assert not ENGLISH.search(result.output.replace("tinygpt exercise linear", ""))
