"""The story: every stage is told, kept and shown; one that fails; a story that goes on; who can be asked."""

import json
import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.errors import UserError
from tinygpt.folders import adapters, checkpoint
from tinygpt.lab import report, story, texts
from tinygpt.shell import chat
from tinygpt.shell.cli import main
from tinygpt.shell.worlds import world_of
from tinygpt.stages import recipes
from tinygpt.text import instructions
from tinygpt.text.stream import encode_prompt


def hears(command: list[str]) -> list[list[int]]:
    """What a model reads (ids) in a chat of three questions, of which the last is the first again."""
    heard, speaker = [], chat.speaker

    def listening(*given, **how) -> tuple:
        *model, speak = speaker(*given, **how)
        return *model, lambda ids, stop: heard.append(ids.tolist()) or speak(ids, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "speaker", listening)
        CliRunner().invoke(main, command, input="Where is it?\nWho?\nWhere is it?\n")
    return heard


def test_a_story_and_what_comes_after_it(toy, tmp_path):
    """Guards: a stage that is not measured, one that is told twice, a base that moves under an adapter."""
    out = tmp_path / "out"
    command = ["story", "--seed", "5", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
        result = CliRunner().invoke(main, command, obj=toy)
    assert result.exit_code == 0 and "report.html, need matplotlib: " in result.output, result.output
    assert "failed" not in result.output and not (out / "report.html").exists(), result.output
    for n, name in enumerate(story.STAGES, 1):
        assert f"--- {n}/{len(story.STAGES)} {name} ({texts.text('en', f'{name}, term')})" in result.output
    told = json.loads((out / "story.json").read_text())
    rows = {name: found["row"] for name, found in told["stages"].items()}
    assert list(rows) == list(story.STAGES)
    whole = rows["pre-training"]["weights"]
    assert rows["instruction tuning"]["weights"] == whole > 10 * rows["LoRA"]["weights"] > 0
    assert rows["pre-training"]["seconds"] > 0 and "seconds" not in rows["two memories"]
    beside = ("pre-training", "in-context learning", "LoRA", "p-tuning", "two memories")
    for name, row in rows.items():
        assert row["base"] == (name in beside)
        assert all(0 <= row[key] <= 1 for key in report.COLUMNS if key in row)
        assert (row["change"] > 0) == (not row["base"] or name == "pre-training")
    for name in ("pre-training", "instruction tuning", "RLHF", "LoRA", "p-tuning"):
        assert rows[name].keys() >= set(report.COLUMNS)
    table = report.story(told["stages"])
    assert all(f"\n{name}" in table for name in rows) and table in result.output
    shown = {name: texts.spoken("en", row["summary"]) for name, row in rows.items() if "summary" in row}
    assert list(shown) == ["in-context learning", "reward model", "two memories"]
    assert all(text in table for text in shown.values())

    for other in (["--seed", "6"], ["--quick", "--seed", "5"], ["--seed", "5", "--dtype", "bfloat16"]):
        refused = CliRunner().invoke(main, ["story", *other, "--out", str(out)], obj=toy)
        assert refused.exit_code == 2 and "has the story of --seed 5; --out takes another" in refused.output
    refused = CliRunner().invoke(main, ["generate", str(out)])
    base = out / told["folder"] / "base"
    assert refused.exit_code == 2 and f"there are models in {base}, " in refused.output

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = CliRunner().invoke(main, command, obj=toy)
    assert again.exit_code == 0 and table in again.output
    assert {path: path.stat().st_mtime_ns for path in times} == times

    where = out / told["folder"]
    for path in (where / "rlhf" / "training.json", where / "stage RLHF.json"):
        path.unlink()  # as a kill would leave it
    assert CliRunner().invoke(main, command, obj=toy).exit_code == 0
    assert instructions.is_tuned(adapters.load_model(*story.where(out, "rlhf"))[1])
    after = json.loads((out / "story.json").read_text())["stages"]["instruction tuning"]["row"]["seconds"]
    assert after == rows["instruction tuning"]["seconds"] > 0

    assert world_of(where / "sft") == "world:5:tiny" and world_of(out) is None
    assert story.questions(out) == [asked for asked, *_ in told["stages"]["instruction tuning"]["samples"]]

    asked = ["chat", "--story", str(out), "--temperature", "0", "--max-new-tokens", "3"]
    heard = [ids for name in ("sft", "base") for ids in hears([*asked, "--stage", name])]
    assert heard[0] == heard[2] != heard[1] and heard[3] == heard[5] != heard[4]  # each stands alone
    assert heard[3] == encode_prompt(checkpoint.load(where / "base")[1], "Where is it?").tolist()
    result = CliRunner().invoke(main, [*asked, "--compare", "base,sft,rlhf,lora,ptuning"], input="Where?\n")
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines() if ":" in line] == [
        "base", "sft", "rlhf", "lora", "ptuning",
    ]  # fmt: skip
    command = [*asked, "--compare", "base,sft,rlhf,lora,ptuning"]
    again = CliRunner().invoke(main, command, input="\n \nWhere?\n")
    assert again.output == result.output  # an empty line is no question
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "is_terminal", lambda stream: True)
        patch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
        korean, english = (CliRunner().invoke(main, [*asked, "--lang", lang]).output for lang in ("ko", "en"))
    assert "질문도 영어로 하십시오." in korean and "ask in English." in english
    assert "Ctrl-D" in korean and "Ctrl-D" in english
    assert [line for line in korean.splitlines() if line.startswith("  ")] == english.splitlines()[2:-1]
    one = CliRunner().invoke(main, [*asked, "--stage", "base"], input="Where?\n")
    base, _ = adapters.load_model(*story.where(out, "base"))
    beside, _ = adapters.load_model(*story.where(out, "lora"))
    assert one.exit_code == 0 and beside.trained is not beside
    np.testing.assert_array_equal(base.flat, beside.flat)
    result = CliRunner().invoke(main, [*asked, "--stage", "dpo"], input="Where?\n")
    assert result.exit_code == 2 and "dpo: the story's models are base, sft" in result.output

    page = (out / "report.html").read_text()
    assert page.count("<svg") == 8 and page.count("<table") > 5 and page.endswith("</html>\n")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # names, and nothing that is fetched


def test_quick_is_a_story_of_a_small_world(tmp_path, monkeypatch):
    """Guards: --quick with the recipe of the whole story, or in its world or folder."""
    labs = []
    monkeypatch.setattr(story, "tell", lambda lab, report: labs.append(lab) or {"stages": {}, "folder": "x"})
    for quick in ([], ["--quick"]):
        command = ["story", "--seed", "5", "--no-report", "--out", str(tmp_path), *quick]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0 and ("This is --quick" in result.output) == bool(quick), result.output
    whole, small = labs
    assert whole.recipe is recipes.FULL and small.recipe is recipes.QUICK and whole.folder != small.folder
    assert (whole.source, small.source) == ("world:5", "world:5:small")
    assert len(whole.world.people("known")) == 5 * len(small.world.people("known"))


def test_a_stage_that_fails_says_so_and_the_others_go_on(tmp_path):
    def fine(lab) -> dict:
        row = {"data": ["data prompt", {}], "weights": 3, "change": 0.5, "seconds": 1.0, "base": False}
        return {"row": row | {"known": 0.25}}

    def broken(lab) -> dict:
        raise ValueError("no such thing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "STAGES", {"pre-training": fine, "RLHF": broken, "LoRA": fine})
        lab = story.Lab(tmp_path, 5)
        told = story.tell(lab)
    assert told["stages"]["RLHF"]["failed"] == "ValueError: no such thing"
    assert told["stages"]["pre-training"]["row"] == told["stages"]["LoRA"]["row"]
    lines = report.story(told["stages"]).splitlines()
    assert lines[2] == f"{'RLHF':24} failed: ValueError: no such thing"
    assert lines[3].split() == ["LoRA", "the", "prompt", "3", "50.0%", "1", "-", "0.25", "-", "-", "-", "no"]
    assert not (lab.folder / "stage RLHF.json").exists()  # it is tried again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["chat"], "say which model: FOLDER, or a story's"),
        (["chat", "x", "--story", "y"], "say which model: FOLDER, or a story's"),
        (["chat", "x", "--story", "y", "--compare", "base"], "say which model: FOLDER, or a story's"),
        (["chat", "x", "--compare", "base,sft"], "--stage and --compare are of a story: name it"),
        (["chat", "--story", "x", "--adapter-folder", "y"], "--story has its own adapters"),
        (["chat", "--story", "x", "--stage", "sft", "--compare", "base"], "leave out --stage"),
        (["chat", "--compare", "base,sft"], "--stage and --compare are of a story: name it"),
        (["chat", "--story", "nowhere"], "nowhere: has no story.json: tinygpt story --out nowhere tells one"),
    ],
)
def test_mistakes(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2 and words in result.output, result.output


def test_every_number_is_finite_in_json(toy, tmp_path):
    result = story.tell(story.Lab(tmp_path, 5, toy))
    text = (tmp_path / "story.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert all(math.isfinite(x) for x in result["stages"]["pre-training"]["change"].values())


def test_a_story_that_was_stopped_early_has_no_questions_yet(tmp_path):
    """Guards: "is damaged" for a story that a user has stopped, or one that another run tells again."""
    (tmp_path / story.FILE).write_text('{"stages": {"pre-training": {}}, "folder": "seed-1"}')
    assert story.questions(tmp_path) == []


DAMAGES = [], {"instruction tuning": []}, {"instruction tuning": {"samples": 1}}


@pytest.mark.parametrize("stages", DAMAGES)
def test_a_damaged_story_is_one_line(tmp_path, stages):
    """Guards: a KeyError in a traceback."""
    (tmp_path / story.FILE).write_text(json.dumps({"stages": stages, "folder": "seed-1"}))
    with pytest.raises(UserError, match="the same tinygpt story command writes it again"):
        story.questions(tmp_path)
    (tmp_path / "seed-1" / "sft").mkdir(parents=True)
    with pytest.raises(UserError, match="the same tinygpt story command writes it again"):
        story.world_of(tmp_path / "seed-1" / "sft")
