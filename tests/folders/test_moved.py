"""A project that was moved: every command that a run, an adapter or a judge allows still works there. A model
that went elsewhere is named anew, and its hash decides whether it is the right one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.shell.cli import main
from tinygpt.shell.registry import STAGES
from tinygpt.text.tokenizer import BPETokenizer

SHORT = ("--max-iters", "2", "--eval-interval", "1", "--warmup-iters", "0", "--batch-size", "2")
RL = ("rlhf", "--max-iters", "1", "--warmup-iters", "0", "--num-prompts", "2", "--num-generations", "2",
      "--max-new-tokens", "2")  # fmt: skip
PAIRS = [{"prompt": f"{a}?", "completion": b} for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)]


def run(*args: str, status: int = 0, stdin: str = ""):
    result = CliRunner().invoke(main, list(args), input=stdin)
    assert result.exit_code == status, (args, result.output, result.exception)
    return result


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Runs of every kind, with options that name each other by relative paths; then all of it is moved."""
    old, new = tmp_path / "old", tmp_path / "new" / "place"
    (old / "data").mkdir(parents=True)
    monkeypatch.chdir(old)
    Path("data/text.txt").write_text("the cat sat on the mat.\n" * 60, encoding="utf-8")
    better = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": "x"} for p in PAIRS]
    for name, rows in (("pairs", PAIRS), ("better", better)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"data/{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = BPETokenizer.train("".join(map(chr, range(32, 127))) + "\n", 270)
    config = GPTConfig(tokenizer.vocab_size, 128, n_layer=1, n_head=2, n_embd=16)
    checkpoint.save(old / "base", GPT(config, np.random.default_rng(0)), tokenizer)
    pairs, comparisons = ("--data", "data/pairs.jsonl"), ("--data", "data/better.jsonl")
    run("pretrain", "--init-from", "base", "--data", "data/text.txt", *SHORT, "--out", "more")
    run("sft", "--init-from", "base", *pairs, *SHORT, "--out", "tuned")
    run("sft", "--init-from", "tuned", *pairs, *SHORT, "--adapter", "lora", "--out", "lora")
    run("reward", "--init-from", "tuned", *comparisons, *SHORT, "--block-size", "128", "--out", "judge")
    run(*RL, "--init-from", "tuned", "--reward-model", "judge", *pairs, "--out", "steered")
    run("rlhf", "--algo", "dpo", "--init-from", "tuned", *comparisons, *SHORT, "--out", "dpo")
    new.parent.mkdir()
    old.rename(new)
    monkeypatch.chdir(tmp_path)
    return new


def settings_of(command: str) -> type:
    return next(stage.Settings for stage in STAGES if stage.name == command)


TUNED = {"lora": "sft", "judge": "reward", "steered": "rlhf", "dpo": "rlhf"}  # runs that need their base


def test_every_command_goes_on_there(project):
    """Guards: paths of the old place in what runs, adapters and judges have saved."""
    p = str(project)
    pairs = "--data", f"{p}/data/pairs.jsonl"
    for folder, command in {"more": "pretrain", "tuned": "sft", **TUNED}.items():
        run(command, "--resume", f"{p}/{folder}")
        assert "/old/" not in str(checkpoint.read_run(project / folder, settings_of(command))[0])
    for folder in "more", "tuned", "steered", "dpo":
        run("generate", f"{p}/{folder}", "--max-new-tokens", "2")
    adapter = (f"{p}/tuned", "--adapter-folder", f"{p}/lora")
    run("generate", *adapter, "--max-new-tokens", "2")
    run("chat", *adapter, "--max-new-tokens", "2", stdin="a?\n")
    run("fewshot", *adapter, *pairs, "--shots", "1", "--count", "2", "--free")
    run("merge", *adapter, "--out", "merged")
    run("label", f"{p}/tuned", *pairs, "--out", "labels.jsonl", stdin="q")
    run("sft", "--init-from", *adapter, *pairs, *SHORT, "--out", "on")
    run(*RL, "--init-from", f"{p}/tuned", "--reward-model", f"{p}/judge", *pairs)


def test_a_model_that_went_elsewhere_is_named_anew(project):
    """Guards: a run that is lost because its base has a new name; a run that goes on with another base."""
    p = str(project)
    (project / "tuned").rename(project / "instructed")
    for folder, command in TUNED.items():
        gone = run(command, "--resume", f"{p}/{folder}", status=2)
        assert "--init-from" in gone.stderr and gone.stderr.count("\n") == 1
        wrong = run(command, "--resume", f"{p}/{folder}", "--init-from", f"{p}/base", status=2)
        assert "another model" in wrong.stderr
    new = (*RL, "--init-from", f"{p}/instructed", "--reward-model", f"{p}/judge", "--data",
           f"{p}/data/pairs.jsonl")  # fmt: skip
    assert "reward --resume" in run(*new, status=2).stderr
    for folder, command in {"lora": "sft", "judge": "reward", "dpo": "rlhf"}.items():
        run(command, "--resume", f"{p}/{folder}", "--init-from", f"{p}/instructed")
        run(command, "--resume", f"{p}/{folder}")  # it remembers
    run(*new)
    (project / "judge").rename(project / "critic")
    where = ("rlhf", "--resume", f"{p}/steered", "--init-from", f"{p}/instructed")
    assert "--reward-model" in run(*where, status=2).stderr
    run(*where, "--reward-model", f"{p}/critic")
    assert "without --reward-model" in run(
        "rlhf", "--resume", f"{p}/dpo", "--reward-model", f"{p}/critic", status=2).stderr  # fmt: skip


def test_a_folder_that_was_moved_alone(project):
    """Guards: paths that hold only from beside the folder. The base stays, the adapter goes."""
    p = str(project)
    run("sft", "--resume", f"{p}/lora", "--data", f"{p}/data/pairs.jsonl")
    shutil.move(project / "lora", project.parent.parent / "elsewhere")
    run("sft", "--resume", "elsewhere")
