"""The demos run, at a size at which they show nothing: what they show is measured, not tested."""

import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from tinygpt.core.train import TrainConfig
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint
from tinygpt.lab.claims import CLAIMS
from tinygpt.shell.cli import main
from tinygpt.stages import evaluate, recipes, reward
from tinygpt.text import examples
from tinygpt.world import corpus, tasks

DEMOS = Path(__file__).parent.parent / "demos"


@pytest.fixture
def demos(tmp_path, monkeypatch):
    """The modules, with few documents, updates and questions; their folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DEMOS)
    names = ["common", *sorted(path.stem for path in DEMOS.glob("[0-9]_*.py"))]
    common, *modules = map(import_module, names)
    monkeypatch.setattr(modules[0], "MOMENTS", (0, 2))
    for number, updates in ((0, 2), (1, 2), (6, 3), (8, 3)):
        monkeypatch.setattr(modules[number], "UPDATES", updates)
    monkeypatch.setattr(modules[4], "COUNTS", (20, 40))
    monkeypatch.setattr(modules[5], "RECIPE", recipes.RLHF | {"max_iters": 2})
    taught_by = reward.taught_by
    monkeypatch.setattr(reward, "taught_by", lambda world: taught_by(world)[:3])
    monkeypatch.setattr(modules[7], "COUNT", 5)
    for module in modules[2:4]:
        monkeypatch.setattr(module, "TRAIN", TrainConfig(max_iters=3))
    for module, name, few in (
        (corpus, "draw", {"documents": 600, "held_out": 20}),
        (evaluate, "gaps", {"count": 30}),
        (evaluate, "recall_by_exposure", {"documents": 300}),
    ):
        monkeypatch.setattr(module, name, partial(getattr(module, name), **few))
    named, journeys = evaluate.named_tasks, tasks.journeys
    monkeypatch.setattr(evaluate, "named_tasks", lambda world, count: named(world, count=4))
    few = lambda world, split, steps, count, *style: journeys(world, split, steps, 5, *style)  # noqa: E731
    monkeypatch.setattr(tasks, "journeys", few)
    yield common, *modules
    for name in names:
        del sys.modules[name]


def test_the_demos_run_from_what_the_one_before_left(demos, capsys):
    common, minute, _, instructions, chain, _, steering, adapters, in_context, customers = demos
    folder = common.FOLDER
    minute.main()
    assert len(re.findall(r"(?m)^ +[02] +\d+ s +\d\.\d\d █+ +0 of 64  ", capsys.readouterr().out)) == 2
    instructions.main(folder)  # makes the model that it needs
    output = capsys.readouterr().out
    assert "loss above it" in output and "recalled" in output and "Saved in" in output
    assert output.count("majority  well-formed") == 2 and re.search(r"moved by \d+\.\d% of", output)
    assert "too hard for this model\n> Write a Python" in output
    model, tokenizer = checkpoint.load(folder)
    assert model.config.vocab_size == tokenizer.vocab_size
    chain.main(folder)
    output = capsys.readouterr().out
    assert "blind guess" not in output and len(re.findall(r"(?: +\d\.\d{3}){5}", output)) == 5
    assert "step the answer changes" in output
    steering.main(folder)  # makes the judge that it needs
    output = capsys.readouterr().out
    assert "(the model's own answer: " in output and "shuffled" in output and "Saved in" in output
    assert len(re.findall(r"\n +\d+( +-?\d+\.\d\d){4}", output)) == 1
    assert output.count("majority  well-formed") == 2 and re.search(r"moved by \d+\.\d% of", output)
    assert common.judge(folder).thoughts == {}  # from the folder: it has answered nothing yet
    adapters.main(folder)
    output = capsys.readouterr().out
    before, after = re.search(r"before (\w{16})\.\.\., after (\w{16})\.\.\.", output).groups()
    assert before == after and "the same, bit for bit" in output and "p-tuning" in output
    in_context.main(folder)
    output = capsys.readouterr().out
    assert output.count("\n  layer ") == 4 and "the same, bit for bit" in output
    assert len(re.findall(r"(?: +\d\.\d{3}){6}", output)) == 4
    without, _, again = re.findall(r"(?m)^with.{14}(.* \|.*)$", output)
    assert without == again
    customers.main(folder)
    output = capsys.readouterr().out
    assert output.count("\n  no adapter") == 3 and len(re.findall(r"(?: +\d+%){3}", output)) == 4
    assert "after: the same." in output


def test_a_demo_says_what_it_is_and_refuses_what_it_does_not_know(demos, monkeypatch, capsys):
    """Guards: minutes of pre-training in a folder called --help."""
    common, *_ = demos
    for given, status, words in (
        (["--help"], 0, "Demo 9"), (["--quick"], 2, "Demo 9"), (["a", "b"], 2, "Demo 9"),
        (["a"], 2, "a: is no model"), ([], 2, "out/demo: is no model"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["demo", *given])
        with pytest.raises(SystemExit) as ended, common.command_line("Demo 9") as folder:
            raise UserError(f"{folder.as_posix()}: is no model")
        out, err = capsys.readouterr()
        assert ended.value.code == status and words in out + err, (given, out, err)


@pytest.mark.skipif(not (DEMOS.parent / "tinygpt").exists(), reason="needs the sources")
def test_the_glossary_names_what_is_there():
    """Guards: a file that was renamed, a demo or a claim that does not exist."""
    page = (DEMOS / "README.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`(\w+/\w+\.py)`", page))
    missing = [file for file in files if not (DEMOS.parent / "tinygpt" / file).exists()]
    assert len(files) >= 20 and not missing
    numbers = set(re.findall(r"[Dd]emo (\d)", page))
    assert numbers == {path.name[0] for path in DEMOS.glob("[0-9]_*.py")}
    assert {int(n) for n in re.findall(r"[Cc]laim (\d+)", page)} <= set(CLAIMS)


@pytest.mark.skipif(not (DEMOS.parent / "tinygpt").exists(), reason="needs the sources")
def test_the_glossary_explains_words_that_a_demo_prints():
    """Guards: a word of the output that was renamed."""
    page = (DEMOS / "README.md").read_text(encoding="utf-8")
    page = page.split("## What the demos print")[1].split("\n## ")[0]
    report = (DEMOS.parent / "tinygpt/lab/report.py").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| (\d) \|.*?\|(.*)", page))
    for path in DEMOS.glob("[0-9]_*.py"):
        words = re.findall(r"`([^`]+)`", re.sub("`questions, .*?`", "", rows.pop(path.name[0])))
        assert words and all(word in path.read_text(encoding="utf-8") + report for word in words), path
    assert not rows


def test_questions_about_natural_text(tmp_path, monkeypatch):
    """Guards: a question whose answer tuning has taught; choices without the right one; a page whose commands
    do not exist."""
    monkeypatch.syspath_prepend(DEMOS)
    import_module("natural_text").main(tmp_path)
    pairs, kinds, does = (examples.read([tmp_path / f"{name}.jsonl"]) for name in ("pairs", "kinds", "does"))
    assert len(pairs) > 1000 and len(kinds) == len(does) > 100
    name = re.compile(r"(?:What does|Is) ([\w.]+)\.(\w+) (?:do|a function or a class)\?")
    modules, others = ({name.fullmatch(e.prompt)[1] for e in part} for part in (pairs, kinds + does))
    assert not modules & others and "difflib" in modules | others
    for example in kinds + does:
        choices = example.row["choices"]
        assert choices.count(example.messages[-1]["content"]) == 1 and len(choices) in (2, 4)
    words = set(re.findall(r" (--[a-z-]+)", (DEMOS / "natural_text.md").read_text(encoding="utf-8")))
    commands = (main.get_command(None, name) for name in main.list_commands(None))
    options = {name for command in commands for option in command.params for name in option.opts}
    assert words <= options
