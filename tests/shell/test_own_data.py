"""One's own data through every stage: each command that a command prints, and each form in each command."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_examples import has, rows_of, write

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.shell.cli import main
from tinygpt.shell.progress import shown_token
from tinygpt.stages.recipes import Recipe
from tinygpt.text import instructions
from tinygpt.text.examples import COMPARISON, EXAMPLE, FORMS, PROMPT
from tinygpt.text.tokenizer import BPETokenizer

ENGLISH = [
    (f"What is the {a} of the {b}?", f"The {a} is {c}.") for a in ("colour", "tone", "shade", "hue")
    for b, c in (("sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"))
]  # fmt: skip
KOREAN = [
    (f"{b}의 {a}은 무엇입니까?", f"{c}입니다.") for a in ("색", "빛", "칠", "톤")
    for b, c in (("하늘", "파란색"), ("풀", "초록색"), ("눈", "하얀색"), ("석탄", "검은색"))
]  # fmt: skip
TINY = ("--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--tokenizer", "bpe", "--vocab-size", "400")


def run(*words: object, keys: str | None = None, status: int = 0, recipe: Recipe | None = None) -> str:
    result = CliRunner().invoke(main, [*map(str, words)], input=keys, obj=recipe)
    assert result.exit_code == status, (words, result.output, result.exception)
    return result.output


def printed(output: str) -> list[list[str]]:
    """The commands that a command prints."""
    return [shlex.split(line)[1:] for line in re.findall(r"tinygpt [a-z].*", output)]


@pytest.mark.parametrize("pairs", [ENGLISH, KOREAN], ids=["English", "Korean"])
def test_each_command_that_is_printed_runs(tmp_path, monkeypatch, pairs):
    """Guards: block_size 128 for a model of 64 positions, "FILE" and "..." for the user's file, a refusal
    that the user's model never says."""
    monkeypatch.chdir(tmp_path)
    Path("own text.txt").write_text("\n".join(f"{p} {c}" for p, c in pairs) * 30, encoding="utf-8")
    write(Path("pairs.jsonl"), [{"prompt": p, "completion": c} for p, c in pairs])
    few = ("--max-iters", "60", "--warmup-iters", "5")
    (following,) = printed(run("pretrain", "--data", "own text.txt", *TINY, *few))
    assert following[0] == "generate" and run(*following, "--max-new-tokens", "5")
    resumed = printed(run("pretrain", "--resume", "out"))
    assert [words[0] for words in resumed] == ["pretrain", "generate"]
    run(*resumed[0], "--max-iters", "1")
    (following,) = printed(run("sft", "--init-from", "out", "--data", "pairs.jsonl", *few))
    assert following[0] == "chat" and run(*following, keys=pairs[0][0])
    (following,) = printed(run("sft", "--init-from", "out", "--data", "pairs.jsonl", "--max-iters", "2",
                               "--adapter", "lora", "--out", "lora"))  # fmt: skip
    assert "--adapter-folder" in following and run(*following, keys=pairs[0][0])

    output = run("label", "sft", "--data", "pairs.jsonl", keys="1" * 13 + "q")
    assert "I do not know" not in output and "13 comparisons in" in output
    labels = Path(printed(output)[0][-1])
    assert labels.name.endswith(".jsonl") and len(labels.read_text().splitlines()) == 13
    labels.write_text(labels.read_text().rstrip())  # an editor may leave out the last end of a line
    output = run("label", "sft", "--data", "pairs.jsonl", keys="1q")
    assert "14 comparisons in" in output and len(labels.read_text().splitlines()) == 14
    Path("list.jsonl").write_text(json.dumps([json.loads(line) for line in labels.read_text().splitlines()]))
    mistake = CliRunner().invoke(main, ["label", "sft", "--data", "pairs.jsonl", "--out", "list.jsonl"])
    assert mistake.exit_code == 2 and "is one list, and label adds lines" in mistake.output
    judge, without = printed(output)
    output = run(*judge)  # as it is printed: updates follow from 12 comparisons
    assert "/3  loss" in output and "Too few to judge" in output
    (steer,) = printed(output)
    output = run(*steer, "--max-iters", "2")
    question = re.search(r"\n> (.*)\n  before: (.*)\n  after:  (.*)\n", output)
    assert question[1] in dict(pairs)
    (following,) = printed(output)
    assert following == ["chat", "rlhf"] and run(*following, keys=pairs[0][0])
    (following,) = printed(run(*without, "--max-iters", "2", "--out", "dpo"))
    assert following == ["chat", "dpo"] and run(*following, keys=pairs[0][0])


def test_a_storys_model_goes_on_by_printed_commands(toy, tmp_path, monkeypatch):
    """Guards: a model of a story, in a folder of its own kind, that the next command does not take."""
    monkeypatch.chdir(tmp_path)
    (talk,) = printed(run("story", "--seed", "5", "--out", "story", "--no-report", recipe=toy))
    answers = run(*talk, "--max-new-tokens", "9", keys="Where?")
    assert talk[0] == "chat" and "sft:" in answers  # greedy, as the story's own samples are
    assert answers == run(*talk, "--max-new-tokens", "9", "--seed", "3", "--temperature", "0", keys="Where?")
    (tuned,) = Path("story").glob("*/sft")
    judge, without = printed(run("label", tuned, keys="1" * 5 + "q"))
    for words in (judge, ["reward", "--init-from", tuned, "--data", "world", "--out", "worldly"]):
        (steer,) = printed(run(*words))
        (talk,) = printed(run(*steer, "--max-iters", "1", "--num-prompts", "2", "--overwrite"))
        assert talk == ["chat", "rlhf"] and run(*talk, "--max-new-tokens", "2", keys="Where?")
    assert printed(run(*without, "--max-iters", "1", "--out", "dpo")) == [["chat", "dpo"]]


@pytest.mark.parametrize(("token", "text"), [
    ("국", "국"), (" 한국어", "␣한국어"), (b" \xed\x95", "␣<ed 95>"), (b"\xb8\xec\x9e\x85\xeb", "<b8>입<eb>"),
    (b"\n", "<0a>"), ("a", "a"), ("\u200b", "<e2 80 8b>"), (b"\xff", "<ff>"),
])  # fmt: skip
def test_a_token_is_shown_as_text_as_far_as_it_is_text(token, text):
    """Guards: a Korean syllable that is shown as three bytes because a part of another one follows."""
    assert shown_token(token.encode() if isinstance(token, str) else token) == text


# --- forms and commands -------------------------------------------------------------------------------------

COMMANDS = {
    "sft": EXAMPLE, "fewshot": EXAMPLE, "ptx": EXAMPLE, "label": PROMPT, "rlhf": PROMPT, "reward": COMPARISON,
    "dpo": COMPARISON,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tuned model, and a judge that was made of it."""
    folder = tmp_path_factory.mktemp("forms")
    tokenizer = BPETokenizer.train("User: Assistant: Where does Ada live? London Paris " * 9, 300)
    tokenizer.chat_template = instructions.TEMPLATE
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16)
    checkpoint.save(folder / "tuned", GPT(config, np.random.default_rng(0)), tokenizer)
    rows = [{"prompt": f"{n}?", "chosen": "London", "rejected": "Paris"} for n in range(3)]
    write(folder / "c.jsonl", rows)
    run("reward", "--init-from", folder / "tuned", "--data", folder / "c.jsonl", "--out", folder / "judge")
    return folder


def words_of(command: str, folder: Path, data: Path, out: Path) -> list:
    """A command on this data."""
    base = ["--init-from", folder / "tuned", "--out", out, "--max-iters", "1"]
    few = ["--num-prompts", "1", "--num-generations", "2", "--max-new-tokens", "2"]
    judged = ["rlhf", *base, *few, "--reward-model", folder / "judge"]
    return {
        "sft": ["sft", *base, "--data", data],
        "fewshot": ["fewshot", folder / "tuned", "--data", data, "--shots", "0", "--free"],
        "ptx": [*judged, "--data", folder / "c.jsonl", "--ptx-data", data, "--ptx-coef", "1"],
        "label": ["label", folder / "tuned", "--data", data, "--out", out],
        "rlhf": [*judged, "--data", data],
        "reward": ["reward", *base, "--data", data],
        "dpo": ["rlhf", "--algo", "dpo", *base, "--data", data],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form.before + form.answers))
def test_each_form_in_each_command(folders, tmp_path, form, command):
    """Guards: a form that one command takes and another refuses: each cell of demos/formats.md."""
    rows = rows_of(form)
    for row in rows[1:]:  # a judge needs two prompts
        for column in (*form.before[:1], *form.answers):
            row[column] = json.loads(json.dumps(row[column]).replace("Where", "So where"))
    data = write(tmp_path / "rows.jsonl", rows)
    words = words_of(command, folders, data, tmp_path / "out")
    if has(form, COMMANDS[command]):
        run(*words, keys="1q")
    else:
        assert "rows.jsonl:1: has [" in run(*words, status=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_out_is_said_by_each_command(folders, tmp_path, command):
    """Guards: one row of thousands that ends a run; rows that are gone without a word."""
    row = {"prompt": "Where?", "completion": "London", "chosen": "London", "rejected": "Paris"}
    empty = {"prompt": "", "completion": "", "chosen": "", "rejected": "a"}
    rows = [row, row | empty, row | {"prompt": "Which?"}, row | {"prompt": "Where? " * 99}]
    data = write(tmp_path / "rows.jsonl", rows)
    output = run(*words_of(command, folders, data, tmp_path / "out"), keys="1q")
    lines = [line for line in output.splitlines() if line.startswith("Left out, ")]
    assert [line.rpartition("first is ")[2] for line in lines] == [f"{data}:2", f"{data}:4"]
    assert "is empty: 1" in lines[0] and "longer than" in lines[1]
