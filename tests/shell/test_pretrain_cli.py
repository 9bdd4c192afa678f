"""`tinygpt pretrain`: what a user does with it, what goes wrong, and what survives a kill.

TINYGPT_KILLS=100 sets the number of runs that are killed.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import kernels
from tinygpt.core.config import PRESETS, GPTConfig
from tinygpt.core.model import GPT
from tinygpt.errors import UserError
from tinygpt.files import tensorfile
from tinygpt.folders import checkpoint, runs
from tinygpt.shell.cli import main
from tinygpt.stages import pretrain as stage
from tinygpt.text import data
from tinygpt.text.tokenizer import CharTokenizer

KILLS = int(os.environ.get("TINYGPT_KILLS", 4))
ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat.\nthe dog lay in the sun.\n" * 40
TINY = [
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4"),
    *("--max-iters", "60", "--eval-interval", "4", "--warmup-iters", "5", "--learning-rate", "1e-2"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the user is: a folder with text.txt."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def pretrain(*options: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["pretrain", *map(str, options)])
    assert result.exit_code == status, result.output + str(result.exception)
    assert status in (0, 130) or "Traceback" not in result.output
    return result.output


def begin(*options: str) -> str:
    return pretrain("--data", "text.txt", *TINY, *options)


def records(out: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def content(path: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


# --- what a user does ---------------------------------------------------------------------------------------


def test_text_in_model_out(folder):
    """Guards: the main job."""
    output = begin()
    assert "val loss" in output and "A sample:" in output and "tinygpt generate out" in output
    assert [r["iter"] for r in records()] == list(range(1, 61))
    assert [r["iter"] for r in records() if "val_loss" in r] == list(range(4, 61, 4))
    assert records()[-1]["val_loss"] < 1.5 < records()[0]["train_loss"]
    model, tokenizer = checkpoint.load("out")
    assert model.config.n_layer == 2 and tokenizer.vocab_size == len(set(TEXT))


def test_a_long_text_is_evaluated_on_batches_from_all_places(folder, monkeypatch):
    """Guards: evaluations that take longer than the training between them."""
    Path("text.txt").write_text(TEXT * 20, encoding="utf-8")
    seen, mean = [], stage.train.mean_loss

    def watched(model, batches, group) -> float:
        seen.append(list(batches))
        return mean(model, seen[-1])

    monkeypatch.setattr(stage.train, "mean_loss", watched)
    for limit in (10**6, 400):
        monkeypatch.setattr(stage, "EVALUATED", limit)
        begin("--max-iters", "1", "--out", str(limit))
    whole, part = ([batch.ids for batch in batches] for batches in seen)
    assert len(whole) > 50 and sum(ids.size for ids in part) < 500
    every = -(-len(whole) // len(part))
    assert all(map(np.array_equal, part, whole[::every])) and len(part) == len(whole[::every])


def test_without_options_it_reads_python(folder, monkeypatch):
    """Guards: a first command that needs a download or an option."""
    monkeypatch.setattr(data, "python_texts", lambda: [TEXT, TEXT.upper()])
    assert "33 kinds of token; 3,457 tokens to train on" in pretrain("--max-iters", "1")
    assert checkpoint.load("out")[0].config.n_embd == 128


@pytest.mark.parametrize("options", [["--tokenizer", "bpe", "--vocab-size", "270"], ["--post-norm"]], ids=str)
def test_other_models(folder, options):
    """Guards: an option that is read and not used."""
    begin(*options, "--dropout", "0.1", "--gradient-accumulation-steps", "2", "--max-iters", "3")
    model, tokenizer = checkpoint.load("out")
    assert records()[0]["train_loss"] == pytest.approx(np.log(tokenizer.vocab_size), abs=0.3)
    assert model.config.post_norm == ("--post-norm" in options) and model.config.dropout == 0.1
    assert (
        model.config.vocab_size == tokenizer.vocab_size == (len(set(TEXT)) if model.config.post_norm else 270)
    )


def test_going_on_from_another_model(folder):
    """Guards: weights made anew, a tokenizer trained on the new text, a context cut in the file."""
    begin("--tokenizer", "bpe", "--vocab-size", "270", "--dropout", "0.1")
    Path("other.txt").write_text(TEXT.upper(), encoding="utf-8")
    few = ["--data", "other.txt", "--max-iters", "2", "--learning-rate", "1e-6", "--block-size", "8"]
    few += ["--dropout", "0.2"]
    pretrain("--init-from", "out", "--out", "tuned", *few)
    (model, tokenizer), (before, old) = checkpoint.load("tuned"), checkpoint.load("out")
    assert tokenizer.tokens == old.tokens
    assert model.config == dataclasses.replace(before.config, dropout=0.2)
    assert 0 < np.abs(model.flat - before.flat).max() < 1e-5
    assert "only 16 positions" in pretrain(
        "--init-from", "out", *few, "--block-size", "17", "--out", "x", status=2
    )
    Path("new.txt").write_text("other letters: äöü" * 99, encoding="utf-8")
    begin("--out", "char", "--max-iters", "1")
    assert "is not in this vocabulary" in pretrain(
        "--init-from", "char", "--data", "new.txt", "--out", "y", status=2
    )
    pretrain("--init-from", "out", *few, "--out", "out", "--overwrite")  # in its own place


def test_going_on_from_a_model_with_more_rows_than_tokens(folder):
    """Guards: a run that trains to its end and then fails on its sample."""
    config = GPTConfig(vocab_size=500, block_size=16, n_layer=1, n_head=1, n_embd=8)
    checkpoint.save(Path("padded"), GPT(config, np.random.default_rng(0)), CharTokenizer.train(TEXT))
    pretrain("--init-from", "padded", "--data", "text.txt", "--max-iters", "2")
    assert checkpoint.load("out")[0].config.vocab_size == 500
    pretrain("--resume", "out")


def test_going_on_from_another_model_is_gentle(folder):
    """Guards: defaults for random weights, which in a few updates destroy what a trained model knows."""
    begin("--max-iters", "1")
    settings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "begin", lambda cls, out, given, *_: settings.append(given) or sys.exit(2))
        pretrain("--init-from", "out", "--warmup-iters", "7", "--out", "x", status=2)
    (found,) = settings
    assert (found.train.learning_rate, found.train.max_iters, found.train.min_lr) == (3e-5, 200, 3e-6)
    assert found.train.warmup_iters == 7 and found.block_size == 16  # 64, but the model has only 16


def test_resuming_takes_everything_from_the_run(folder, monkeypatch):
    """Guards: a resumed run that is another run; one that cannot find its text from another folder."""
    begin("--dropout", "0.1", "--gradient-accumulation-steps", "2", "--out", "whole")
    saves, save = [], checkpoint.save_trainer

    def stop(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) == 6:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_trainer", stop)
        output = pretrain(
            "--data", "text.txt", *TINY, "--dropout", "0.1", "--gradient-accumulation-steps", "2", status=2
        )
    assert "the disk is gone" in output and records()[-1]["iter"] == 20
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    pretrain("--resume", "../out")
    monkeypatch.chdir(folder)
    assert content("out")["model.safetensors"] == content("whole")["model.safetensors"]
    for ours, whole in zip(records("out"), records("whole"), strict=True):
        assert all(ours[key] == whole[key] for key in whole if key not in ("elapsed_s", "tokens_per_s"))
    assert sorted(times := [r["elapsed_s"] for r in records()]) == times
    assert "A sample:" in pretrain("--resume", "out")  # a finished run has nothing left to do


def test_resuming_with_the_text_gone_moved_or_changed(folder):
    """Guards: a run that goes on with another text."""
    begin("--max-iters", "4")
    Path("text.txt").rename("moved.txt")
    assert "text.txt: no such file" in pretrain("--resume", "out", status=2)
    pretrain("--resume", "out", "--data", "moved.txt")
    Path("moved.txt").write_text(TEXT + "x", encoding="utf-8")
    before = content("out")
    assert "moved.txt: not the data" in pretrain("--resume", "out", "--data", "moved.txt", status=2)
    assert content("out") == before
    assert "leave out --max-iters, --seed" in pretrain(
        "--resume", "out", "--seed", "1", "--max-iters", "9", status=2
    )
    assert "nothing to resume" in pretrain("--resume", ".", status=2)


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (["--batch-size", "0"], "--batch-size"),
    (["--learning-rate", "-1"], "--learning-rate"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--min-lr", "1"], "min_lr"),
    (["--n-head", "3"], "n_head 3 does not divide n_embd 16"),
    (["--data", "missing.txt"], "missing.txt"),
    (["--data", "empty.txt"], "empty.txt: is empty"),
    (["--data", "empty"], "empty: has no text"),
    (["--data", "latin.txt"], "tinygpt: latin.txt: byte 1 is not UTF-8"),
    (["--data", "text.txt", "--block-size", "999"], "a block of 999 needs 1000"),
    (["--data", "short.txt"], "give more text or a smaller block size"),
    (["--preset", "huge"], "nano"),
    (["--tokenizer", "words"], "words"),
    (["--tokenizer", "bpe", "--vocab-size", "100"], "vocab_size 100 is too small"),
    (["--vocab-size", "300"], "--vocab-size"),
    (["--init-from", "nowhere"], "leave out"),
    (["--out", "text.txt"], "text.txt: is a file"),
    (["--out", "text.txt/out"], "text.txt"),
    (["--out", "model"], "--overwrite"),
    (["--dropout", "1"], "--dropout"),
    (["--n-embd", "400000"], "n_embd 400000"),
    (["--n-embd", "10000000000000"], "n_embd 10000000000000"),
    (["--block-size", "10000000000"], "block_size 10000000000"),
    (["--n-layer", "1000000000"], "--n-layer is 1000000000"),
    (["--batch-size", "100000000"], "batch_size is 100000000"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_written(folder, options, words):
    """Guards: a traceback, an hour of training before the error, another model lost."""
    Path("latin.txt").write_bytes(b"Z\xfcrich " * 99)
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    Path("empty").mkdir()
    Path("model").mkdir()
    Path("model", "model.safetensors").write_text("precious")
    output = pretrain(*TINY, *(["--data", "text.txt"] if "--data" not in options else []), *options, status=2)
    (line,) = [line for line in output.splitlines() if not line.startswith(("Usage:", "Try ")) and line]
    assert words in line and line.startswith(("tinygpt: ", "Error: "))
    assert content("model") == {"model.safetensors": b"precious"}
    assert not Path("out").exists() or not content("out")


def test_too_little_memory(folder, monkeypatch):
    """Guards: numpy's traceback where a model that could be is more than this machine holds."""
    monkeypatch.setattr(stage.variants, "build", lambda *_: np.empty(10**15))
    (line,) = pretrain("--data", "text.txt", status=2).splitlines()
    assert line.startswith("tinygpt: not enough memory: choose smaller sizes. Unable to allocate")


def test_every_preset_can_be_named():
    """Guards: a preset that --help promises and the model does not have, or the other way round."""
    (option,) = [option for option in main.commands["pretrain"].params if option.name == "preset"]
    assert tuple(option.type.choices) == tuple(PRESETS)


def test_sizes_and_a_model_to_begin_with(folder):
    """Guards: --n-layer silently ignored beside --init-from."""
    begin("--max-iters", "1")
    output = pretrain("--init-from", "out", "--out", "x", "--n-layer", "9", "--preset", "gpt2", status=2)
    assert "leave out --n-layer, --preset" in output


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(folder):
    """Guards: an hour of training before the error."""
    Path("out").mkdir(mode=0o500)
    assert "read-only" in pretrain("--data", "text.txt", *TINY, status=2)


def test_overwriting_needs_to_be_said(folder):
    """Guards: a model lost to a repeated command, metrics of two runs in one file."""
    begin("--max-iters", "4")
    before = content("out")
    assert "--overwrite" in pretrain("--data", "text.txt", *TINY, status=2)
    assert content("out") == before
    pretrain("--data", "text.txt", *TINY, "--max-iters", "4", "--seed", "1", "--overwrite")
    assert content("out")["model.safetensors"] != before["model.safetensors"] and len(records()) == 4


def test_a_run_that_explodes_keeps_what_it_had(folder):
    """Guards: a checkpoint full of NaN, and no word on what to do."""
    output = pretrain("--data", "text.txt", *TINY, "--learning-rate", "1e30", "--grad-clip", "0", status=2)
    assert "lower learning rate" in output.splitlines()[-1]
    assert np.isfinite(checkpoint.load("out")[0].flat).all()


# --- what survives ------------------------------------------------------------------------------------------


class DeathError(BaseException):
    """Stands in for a kill: nothing of tinygpt catches it."""


def die_at(patch: pytest.MonkeyPatch, n: int, after: bool) -> None:
    """Makes the n-th file to be replaced from now on the last, or the first that is not."""
    left, replace = [n], os.replace

    def last(*paths):
        left[0] -= 1
        if after or left[0]:
            replace(*paths)
        if not left[0]:
            raise DeathError

    patch.setattr(os, "replace", last)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("old", [[], ["text.txt", "--n-embd", "32"], ["upper.txt", "--seed", "1"]], ids=str)
@pytest.mark.parametrize("n", range(1, 9))
def test_a_death_between_any_two_files(folder, n, old, after):
    """Guards: a folder that neither goes on nor begins anew; an old model's weights with new tokens."""
    short = ["--max-iters", "2", "--eval-interval", "2"]
    Path("upper.txt").write_text(TEXT.upper(), encoding="utf-8")
    replacing, weights, tokens, new_tokens = [], None, None, CharTokenizer.train(TEXT).tokens
    if old:
        pretrain(*TINY, *short, "--data", *old)
        model, tokenizer = checkpoint.load("out")
        replacing, weights, tokens = ["--overwrite"], model.flat.tobytes(), tokenizer.tokens
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeathError):
        die_at(patch, n, after)
        begin(*short, *replacing)
    try:
        model, tokenizer = checkpoint.load("out")
    except UserError:
        assert n < 6
    else:
        assert tokenizer.tokens == (tokens if model.flat.tobytes() == weights else new_tokens)
    if Path("out/trainer.safetensors").exists():
        pretrain("--resume", "out")
    else:
        begin(*short)  # nothing of this run was saved, and nothing is in the way of a new one
    model, tokenizer = checkpoint.load("out")
    assert tokenizer.tokens == (tokens if old and (n, after) == (1, False) else new_tokens)
    assert len(records()) == 2
    assert set(content("out")) == {*checkpoint.FILES, "metrics.jsonl"}


@pytest.mark.skipif("c" not in kernels.available(), reason="NumPy's own threads are not tinygpt's")
def test_the_number_of_threads_changes_no_byte(folder):
    """Guards: a sum whose order depends on how work was divided; sizes are large enough to be divided."""
    options = ["--data", "text.txt", "--n-embd", "64", "--max-iters", "3", "--eval-interval", "3"]
    options += ["--gradient-accumulation-steps", "2", "--dropout", "0.1"]
    results = set()
    for threads in ("1", "2", "3"):
        run = start(*options, "--out", threads, TINYGPT_THREADS=threads, TINYGPT_BACKEND="c")
        output, _ = run.communicate()
        assert run.returncode == 0, output
        results.add(content(threads)["trainer.safetensors"])
    assert len(results) == 1


def start(*options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "from tinygpt.shell.cli import main; main()", "pretrain", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def wait_for_iterations(run: subprocess.Popen) -> None:
    while run.poll() is None and (
        not Path("out/metrics.jsonl").exists() or not content("out")["metrics.jsonl"]
    ):
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_run_comes_out_the_same(folder):
    """Guards: weights and moments of different updates, half a file, records lost or told twice."""
    began = time.perf_counter()
    options = ["--data", "text.txt", *TINY, "--eval-interval", "2"]
    assert start(*options, "--out", "whole").wait() == 0
    length = time.perf_counter() - began
    whole, rng, killed = content("whole")["model.safetensors"], random.Random(0), 0
    for _ in range(KILLS):
        shutil.rmtree("out", ignore_errors=True)
        run = start(*options)
        time.sleep(length * rng.uniform(0.2, 1))
        killed += run.poll() is None
        run.kill()
        run.communicate()
        if Path("out/metrics.jsonl").exists():  # from the first iteration on there is a model, whole
            checkpoint.load("out")
            run = start("--resume", "out")
        else:
            run = start(*options, "--overwrite")
        output, _ = run.communicate()
        assert run.returncode == 0, output
        assert content("out")["model.safetensors"] == whole
        assert [r["iter"] for r in records()] == list(range(1, 61))
        assert set(content("out")) == {*checkpoint.FILES, "metrics.jsonl"}  # no leftovers
    assert killed


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on(folder, name):
    """Guards: a traceback, and the work since the last save lost."""
    options = ["--data", "text.txt", *TINY, "--eval-interval", "10000", "--max-iters", "10000"]
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)  # or a child of nohup ignores it
    run = start(*options)
    signal.signal(number, before)
    wait_for_iterations(run)
    run.send_signal(number)
    output, _ = run.communicate()
    assert run.returncode == 130 and "Traceback" not in output
    assert output.splitlines()[-1].endswith("tinygpt pretrain --resume out")
    state = json.loads(tensorfile.tensors(Path("out/trainer.safetensors"))[1]["tinygpt"])
    assert 1 <= state["step"] == len(records()) < 10000


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
def test_a_second_process_in_one_folder_is_refused(folder):
    """Guards: two processes in one folder. Each deleted what the other wrote, and the run was lost."""
    begin("--out", "out")
    before = content("out")
    program = "import sys; from tinygpt.folders import runs; from pathlib import Path\n"
    program += "from tinygpt.stages.pretrain import Pretrain\n"
    program += "run = runs.resume(Pretrain, Path('out')); print('resumed', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as first:
        assert first.stdout.readline() == "resumed\n"
        for more in (["--resume", "out"], ["--data", "text.txt", *TINY, "--out", "out", "--overwrite"]):
            output = pretrain(*more, status=2)
            assert "another process is writing there" in output and output.count("\n") == 1
        first.stdin.close()
        assert first.wait() == 0
    assert content("out") == before
    pretrain("--resume", "out")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_pipe_saves(folder):
    """Guards: `pretrain | head -1`, after which all since the last evaluation was lost."""
    options = " ".join(["--data", "text.txt", *TINY, "--eval-interval", "10000", "--max-iters", "10000"])
    shell = f"{sys.executable} -m tinygpt pretrain {options} | head -2"
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr
    state = json.loads(tensorfile.tensors(Path("out/trainer.safetensors"))[1]["tinygpt"])
    assert 1 <= state["step"] == len(records()) < 10000


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_run_whose_folder_is_removed_writes_it_again(folder):
    """Guards: hours of training that end in "no such file", or in a folder without a config."""
    process = start("--data", "text.txt", *TINY, "--eval-interval", "100000", "--max-iters", "100000")
    wait_for_iterations(process)
    Path("out").rename("removed")
    wait_for_iterations(process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "To continue" in output, output
    step = json.loads(tensorfile.tensors(Path("out/trainer.safetensors"))[1]["tinygpt"])["step"]
    assert step == records()[-1]["iter"] > 1
    before = checkpoint.load("out")[0].flat
    settings, tokenizer = checkpoint.read_run(Path("out"), stage.Settings)
    optimizer = settings.train.optimizer(GPT(settings.model))
    checkpoint.load_trainer(Path("out"), optimizer)
    assert (optimizer.model.flat == before).all()


@pytest.mark.parametrize("module, name, call", [(runs, "writing", 4), (checkpoint, "save_trainer", 2)])
def test_a_folder_that_is_removed_in_the_middle_of_a_write(folder, monkeypatch, module, name, call):
    """Guards: a run that ends with "no such file", because the folder was removed at this moment."""
    real, calls = getattr(module, name), []

    def removed(*args):
        calls.append(args)
        if len(calls) == call:  # the fourth record, or the last save
            Path("out").rename("removed")
        return real(*args)

    monkeypatch.setattr(module, name, removed)
    begin("--eval-interval", "1000")
    state = json.loads(tensorfile.tensors(Path("out/trainer.safetensors"))[1]["tinygpt"])
    assert state["step"] == 60 and checkpoint.load("out") and Path("removed").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX files")
@pytest.mark.parametrize("how", ["pipe", "device", "long line"])
def test_records_that_never_end_are_left_out(folder, how):
    """Guards: a run that waits for ever for its own records, or takes all memory."""
    begin()
    path = Path("out/metrics.jsonl")
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[" * (1 << 26))
    tracemalloc.start()
    pretrain("--resume", "out", "--data", "text.txt")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert path.is_file() and not path.is_symlink() and not path.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
def test_a_run_does_not_write_into_another_folder_of_its_name(folder, monkeypatch):
    """Guards: two runs in one folder, after the folder of the first was renamed."""
    import fcntl  # Windows has none

    real, others = open, []

    def replaced(path, mode="r", *rest, **more):
        """Opens a file. With the third record, another run takes the name of the folder and locks it."""
        file = real(path, mode, *rest, **more)
        if str(path).endswith("metrics.jsonl") and mode == "a" and len(records()) == 2:
            Path("out").rename("older")
            Path("out").mkdir()
            others.append(os.open("out", os.O_RDONLY))
            fcntl.flock(others[0], fcntl.LOCK_EX)
        return file

    monkeypatch.setattr(runs, "open", replaced, raising=False)
    output = pretrain("--data", "text.txt", *TINY, "--eval-interval", "1000", status=2)
    os.close(others[0])
    assert output.count("another process is writing there") == 1
    assert not any(Path("out").iterdir()) and checkpoint.load("older") and len(records("older")) == 3


def test_a_folder_that_another_run_has_filled_meanwhile(folder, monkeypatch):
    """Guards: a finished model that is replaced without --overwrite, by a run that began before."""
    tokenizer = CharTokenizer.train(TEXT)
    other = GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 4))
    made = stage.data.stream
    monkeypatch.setattr(
        stage.data, "stream", lambda *a: (checkpoint.save(folder / "out", other, tokenizer), made(*a))[1]
    )
    assert "already has a config.json" in pretrain("--data", "text.txt", *TINY, status=2)
    assert checkpoint.load("out")[0].config == other.config


def test_a_record_that_cannot_be_written_costs_no_update(folder, monkeypatch):
    """Guards: all since the last save, lost because the disk is full."""
    real = open

    def full(path, mode="r", *rest, **more):
        if str(path).endswith("metrics.jsonl") and mode == "a" and len(records()) == 3:
            raise OSError(28, "No space left on device", str(path))
        return real(path, mode, *rest, **more)

    monkeypatch.setattr(runs, "open", full, raising=False)
    assert "No space left" in pretrain("--data", "text.txt", *TINY, "--eval-interval", "1000", status=2)
    state = json.loads(tensorfile.tensors(Path("out/trainer.safetensors"))[1]["tinygpt"])
    assert state["step"] == 4
