"""Instruction tuning: what is learned and what is not, packing, batches; then `tinygpt sft` and `chat`."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import train
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.train import TrainConfig
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint, runs
from tinygpt.shell.cli import main
from tinygpt.stages import sft
from tinygpt.stages.answers import Answer, answers
from tinygpt.text import data, examples, instructions
from tinygpt.text.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer

HOMES = {
    **{"Ada": "London", "Alan": "Wilmslow", "Grace": "Arlington", "Edsger": "Nuenen", "Barbara": "Boston"},
    **{"Donald": "Stanford", "Niklaus": "Zurich", "Ken": "Reno", "Dennis": "Berkeley", "Bjarne": "Aarhus"},
}
PAIRS = [{"prompt": f"Where does {name} live?", "completion": home} for name, home in HOMES.items()]
TALK = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Ada?"},
    {"role": "assistant", "content": "London"},
    {"role": "user", "content": "And the one who lives in Zurich?"},
    {"role": "assistant", "content": "Niklaus, of course"},
]}  # fmt: skip
TOKENIZER = BPETokenizer.train(" ".join(map(json.dumps, [*PAIRS, TALK])) + "User: Assistant: System:", 400)
CONFIG = GPTConfig(vocab_size=400, block_size=64, n_layer=2, n_head=2, n_embd=32)


def write(path: str | Path, lines: list) -> str:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the user is: a folder with a model, `base`, and examples, `pairs.jsonl`."""
    monkeypatch.chdir(tmp_path)
    model = GPT(dataclasses.replace(CONFIG, vocab_size=TOKENIZER.vocab_size), np.random.default_rng(0))
    model.flat[-200:] += 0.01  # biases of a trained model are not zero
    checkpoint.save(tmp_path / "base", model, TOKENIZER)
    write("pairs.jsonl", [*PAIRS, TALK])
    return tmp_path


def settings(path: str, **changes) -> sft.Settings:
    fields = {"model": CONFIG, "train": TrainConfig(), "data": (path,), "block_size": 64, "batch_size": 2}
    return sft.Settings(**(fields | changes))


def staged(chosen: sft.Settings) -> sft.SFT:
    return sft.SFT(chosen, chosen.train.optimizer(make()), TOKENIZER, sft.SFT.read(chosen, runs.STORE))


def read(path: str, **changes) -> sft.SFT:
    return staged(settings(path, **changes))


def make(dtype=np.float32) -> GPT:
    model = GPT(CONFIG, np.random.default_rng(0), dtype)
    model.flat *= 1.4  # so that what is attended to matters
    return model


def encoded(lines: list, path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    read = examples.read([write(path, lines)])
    return [instructions.encode(TOKENIZER, example.messages) for example in read]


# --- rows and their weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_learned_is_each_answer_and_its_end(folder, packing):
    """Guards: TRL 1623, 3083, nanochat 810: an end that is masked as padding; padding that is learned."""
    results = read("pairs.jsonl", packing=packing)
    pairs = encoded([*PAIRS, TALK], folder / "again.jsonl")
    records = []
    for rows in (results.rows, results.val_rows):
        assert (rows.positions[:, 0] == 0).all() and set(np.unique(rows.weights)) <= {0, 1}
        for r, c in zip(*np.nonzero(rows.weights), strict=True):  # each learned token, with all that it sees
            begin = rows.start[r, c]
            records.append((*rows.ids[r, begin : c + 1], rows.targets[r, c]))
    expected = [tuple(ids[: n + 1]) for ids, learned in pairs for n in np.flatnonzero(learned)]
    assert sorted(records) == sorted(expected)
    assert sum(ids[-1] == TOKENIZER.eos_id for ids in records) == len(PAIRS) + 2
    assert results.example_count == 10 and len(results.questions) == 1
    assert len(results.rows.ids) == (4 if packing else 10)


def test_packed_logits_are_those_of_each_example_alone(folder):
    """Guards: TRL 1230, 3067: packed examples that attend to each other; positions that go on; neighbours and
    padding in a batch that matter."""
    model, pairs = make(), encoded([*PAIRS, TALK], folder / "x.jsonl")
    rows = data.pack(pairs, 64)
    assert len(rows.ids) < len(pairs)
    alone = {tuple(ids[:-1]): model.forward(ids[None, :-1])[0][0].copy() for ids, _ in pairs}
    padded = train.Batch(*map(np.concatenate, zip(*(data.pack([pair], 64) for pair in pairs), strict=True)))
    for batch in (rows, padded, *sft.consecutive(padded, 4)):
        logits, _ = model.forward(batch.ids, start=batch.start, positions=batch.positions)
        for r in range(len(batch.ids)):
            for begin in np.unique(batch.start[r][batch.targets[r] > 0]):
                mine = (batch.start[r] == begin) & (batch.targets[r] > 0)
                assert np.abs(logits[r, mine] - alone[tuple(batch.ids[r, mine])]).max() < 1e-5
    assert max(np.abs(a).max() for a in alone.values()) > 0.5


def test_packing_and_accumulation_change_no_gradient(folder):
    """Guards: TRL 2175, 2604: n micro-batches that are not the large batch; nanochat 590, 811: a mean of a
    micro-batch where nothing is learned; an example that counts by its row."""
    write("many.jsonl", [*PAIRS, TALK] * 5)
    gradients, losses = [], []
    for packing, batch_size, steps in ((True, 99, 1), (False, 99, 1), (False, 10, 5), (False, 5, 10)):
        chosen = settings("many.jsonl", packing=packing, batch_size=batch_size,
                          gradient_accumulation_steps=steps)  # fmt: skip
        optimizer = TrainConfig().optimizer(make(np.float64))
        batches = sft.update(staged(chosen).rows, chosen, 0)
        assert len(batches) == steps
        assert sum(batch.weights.sum(dtype=np.float64) for batch in batches) == pytest.approx(1, abs=1e-6)
        losses.append(train.gradients(optimizer)(batches))
        gradients.append(optimizer.flat.copy())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    for other in gradients[1:]:
        assert np.abs(other - gradients[0]).max() < 1e-6 * np.abs(gradients[0]).max()


def test_a_batch_in_which_nothing_is_learned(folder):
    """Guards: 0 / 0."""
    rows = read("pairs.jsonl", packing=False).rows
    rows.weights[:] = 0
    optimizer = TrainConfig().optimizer(make())
    batches = sft.update(rows, settings("", gradient_accumulation_steps=2), 0)
    assert train.gradients(optimizer)(batches) == 0 and (optimizer.flat == 0).all()
    assert train.mean_loss(optimizer.model, sft.consecutive(rows, 2)) == 0


def test_batches_have_few_lengths(folder):
    """Guards: a length for every batch, of each of which a record would be kept."""
    lines = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 60)]
    rows = read(write("many.jsonl", lines), packing=False, block_size=CONFIG.block_size).rows
    lengths = {batch.ids.shape[1] for batch in sft.consecutive(rows, 1)}
    assert len(lengths) > 1 and all(n % 32 == 0 or n == CONFIG.block_size for n in lengths)


def test_an_epoch_has_every_row_once_and_depends_on_seed_and_number(folder):
    """Guards: a resumed run that begins its epoch anew; the same order in each epoch; rows never seen."""
    chosen = settings("pairs.jsonl", packing=False, batch_size=2, gradient_accumulation_steps=2)
    rows = staged(chosen).rows  # 10 rows
    updates = [[row.tobytes() for batch in sft.update(rows, chosen, n) for row in np.pad(
        batch.ids, ((0, 0), (0, 64 - batch.ids.shape[1])))] for n in range(5)]  # fmt: skip
    order = sum(updates, [])
    epochs = order[:10], order[10:]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 10 and epochs[0] != epochs[1]
    other = settings("pairs.jsonl", packing=False, train=TrainConfig(seed=3))
    marks = [stage.settings.fingerprint for stage in (staged(chosen), staged(other))]
    assert marks[0] != marks[1]
    few = settings("pairs.jsonl", packing=False, batch_size=99)
    assert len(sft.update(rows, few, 3)[0].ids) == 10  # none twice


def test_long_examples_are_left_out_and_counted(folder):
    """Guards: an answer cut off in its middle, which teaches not to stop; a silent loss of examples."""
    long = {"prompt": "x " * 80, "completion": "y"}
    write("some.jsonl", [*PAIRS, long, long])
    write("none.jsonl", [long] * 3)

    def left_out(**changes) -> int:
        return sum(map(len, read("some.jsonl", **changes).notes.values()))

    stage = read("some.jsonl")
    reason = "Left out, as longer than the block size, 64 tokens"
    assert str(stage.notes) == f"{reason}: 2, the first is some.jsonl:11"
    assert stage.example_count == 9 and left_out(val_data=("some.jsonl",)) == 4
    longest = max(len(ids) for ids, _ in encoded(PAIRS, folder / "x.jsonl"))
    assert left_out(block_size=longest - 1) == 2 < left_out(block_size=longest - 2)
    with pytest.raises(UserError, match=f"no example can be used. {reason}: 3, the first is none.jsonl:1"):
        read("none.jsonl")
    write("one.jsonl", PAIRS[:1])
    with pytest.raises(UserError, match="one example is too few"):
        read("one.jsonl")
    assert len(read("one.jsonl", val_data=("pairs.jsonl",)).questions) == 11


def test_the_learning_rate_falls_with_the_size():
    assert sft.learning_rate(GPTConfig()) == 4.5e-5  # GPT-2
    assert sft.learning_rate(CONFIG) == 1e-3
    assert sft.learning_rate(GPTConfig(1024, 128, 4, 4, 256)) == pytest.approx(2.7e-4, rel=0.02)


# --- the command --------------------------------------------------------------------------------------------

FAST = [*("--learning-rate", "1e-2", "--max-iters", "90", "--eval-interval", "30", "--batch-size", "4")]


def run(*options: str, status: int = 0, **kwargs) -> str:
    result = CliRunner().invoke(main, [*map(str, options)], **kwargs)
    assert result.exit_code == status, result.output + str(result.exception)
    assert status in (0, 130) or "Traceback" not in result.output
    return result.output


def tune(*options: str, status: int = 0) -> str:
    return run("sft", "--init-from", "base", "--data", "pairs.jsonl", *FAST, *options, status=status)


def records(out: str = "sft") -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_a_model_learns_to_answer_and_to_stop(folder):
    """Guards: the main job. It answers what it was trained on, word for word, stops there, and says how far
    it moved; `chat` asks in the same form and remembers what was said."""
    output = tune("--val-data", "pairs.jsonl")
    assert "11 examples in" in output and "val loss" in output and "tinygpt chat sft" in output
    assert f"> {PAIRS[0]['prompt']}\nLondon\n  (in the data: London)" in output
    model, tokenizer = checkpoint.load("sft")
    results = answers(model, tokenizer, [pair["prompt"] for pair in PAIRS], 20)
    assert results == [Answer(pair["completion"], True) for pair in PAIRS]
    assert answers(model, tokenizer, [TALK["messages"][:-1]], 20) == [Answer("Niklaus, of course", True)]

    before, _ = checkpoint.load("base")
    total, each = train.weight_change(before.params, model.params)
    assert records()[-1]["weight_change"] == pytest.approx(total) and total > 0.05
    assert f"The weights moved by {total:.1%}" in output
    assert all(change > 0 for change in each.values())  # all weights are trained
    assert [("weight_change" in r, "val_loss" in r) for r in records()].count((True, True)) == 3
    assert records()[-1]["val_loss"] < 0.05 < 3 < records()[0]["train_loss"]

    sentences = "".join(f"{pair['prompt']}\n" for pair in PAIRS[:4])
    spoken = run("chat", "sft", "--temperature", "0", input=sentences)
    assert spoken.splitlines()[0] == "London" and len(spoken.splitlines()) == 4
    history = []
    for line, answer in zip(sentences.splitlines(), spoken.splitlines(), strict=True):
        history.append({"role": "user", "content": line})
        while len(instructions.prompt(tokenizer, history)) > 32:  # half the context
            del history[:2]
        assert answers(model, tokenizer, [history], 200)[0].text == answer
        history.append({"role": "assistant", "content": answer})
    assert len(history) < 8
    assert run("chat", "sft", "--stop", "d", "--temperature", "0", input=PAIRS[0]["prompt"]) == "Lon\n"


def test_resuming_gives_the_same_bytes(folder, monkeypatch):
    """Guards: rows in another order, moments lost, a form lost; data or a first model that is gone."""
    options = ("--dropout", "0.1", "--gradient-accumulation-steps", "2")
    tune(*options, "--out", "whole")
    save, saves = checkpoint.save_trainer, []

    def stop(*arguments):
        save(*arguments)
        saves.append(arguments)
        if len(saves) == 2:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_trainer", stop)
        assert "the disk is gone" in tune(*options, status=2)
    assert records()[-1]["iter"] == 30
    (folder / "elsewhere").mkdir()
    Path("pairs.jsonl").rename("elsewhere/moved.jsonl")
    monkeypatch.chdir(folder / "elsewhere")
    assert "pairs.jsonl: no such file" in run("sft", "--resume", "../sft", status=2)
    write("other.jsonl", PAIRS)
    assert "not the data" in run("sft", "--resume", "../sft", "--data", "other.jsonl", status=2)
    run("sft", "--resume", "../sft", "--data", "moved.jsonl")
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        assert Path("../sft", name).read_bytes() == Path("../whole", name).read_bytes()
    for ours, whole in zip(records("../sft"), records("../whole"), strict=True):
        assert all(ours[key] == whole[key] for key in whole if key not in ("elapsed_s", "tokens_per_s"))
    assert "leave out --seed" in run("sft", "--resume", "../sft", "--seed", "1", status=2)
    again = ("sft", "--resume", "../sft", "--data", "moved.jsonl")  # nothing is left to do
    output = run(*again)
    assert "All 90 updates" in output and "weights moved" in output
    checkpoint.save(Path("../base"), *checkpoint.load("../sft"))  # another model in its place
    assert "weights moved" not in run(*again)
    shutil.rmtree("../base")
    assert "weights moved" not in run(*again)


def test_a_tuned_model_stays_tuned(folder):
    """Guards: a form that is lost when training goes on; a run taken up by another stage's command."""
    tune("--max-iters", "2", "--eval-interval", "1")
    Path("text.txt").write_text("Ada lives in London. " * 99, encoding="utf-8")
    text = ["--data", "text.txt", "--max-iters", "2", "--block-size", "8"]
    run("pretrain", "--init-from", "sft", "--out", "more", *text)
    run("pretrain", "--resume", "more")
    assert instructions.is_tuned(checkpoint.load("more")[1])
    tune("--init-from", "more", "--out", "again", "--max-iters", "1")
    assert instructions.is_tuned(checkpoint.load("again")[1])
    assert not instructions.is_tuned(checkpoint.load("base")[1])
    assert "one of tinygpt 'sft'" in run("pretrain", "--resume", "sft", status=2)
    assert "one of tinygpt 'pretrain'" in run("sft", "--resume", "more", status=2)
    tune("--init-from", "sft", "--overwrite", "--max-iters", "1")  # in its own place
    assert records()[-1]["weight_change"] > 0


def test_a_death_before_the_form_is_written(folder, monkeypatch):
    """Guards: a tuned model in the folder of its base that is taken for one that was not tuned."""
    before = {path.name: path.read_bytes() for path in Path("base").iterdir()}
    model, tokenizer = checkpoint.load("base")
    model.flat[:] += 1
    tokenizer.chat_template = instructions.TEMPLATE
    monkeypatch.setattr(BPETokenizer, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(Path("base"), model, tokenizer)
    assert {path.name: path.read_bytes() for path in Path("base").iterdir()} == before


def test_show_prints_tokens_and_mask_and_writes_nothing(folder):
    """Guards: a mask that nobody can look at."""
    lines = tune("--show", "1").splitlines()
    ids, learned = encoded(PAIRS[:1], folder / "x.jsonl")[0]
    assert lines[0] == f"pairs.jsonl:1: {len(ids)} tokens, {learned.sum()} learned"
    assert [line.split()[0] == "learned" for line in lines[1:]] == learned.tolist()
    assert [int(line.split()[1]) for line in lines[1:]] == ids.tolist()
    assert lines[-1].split() == ["learned", str(TOKENIZER.eos_id), END_OF_TEXT]
    assert not Path("sft").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--data", "bad.jsonl"], "bad.jsonl:2: is not JSON"),
    (["--val-data", "bad.jsonl"], "bad.jsonl:2: is not JSON"),
    (["--data", "half.jsonl"], "half.jsonl:1: U+D800 is half of a surrogate pair"),
    (["--init-from", "nowhere"], "nowhere: no such folder"),
    (["--init-from", "chars"], "no end-of-text token"),
    (["--init-from", "narrow"], "the character"),
    (["--out", "base"], "--overwrite"),
    (["--out", "pairs.jsonl"], "pairs.jsonl: is a file"),
    (["--block-size", "65"], "the model has only 64 positions"),
    (["--block-size", "3"], "Left out, as longer than the block size, 3 tokens: 11, the first"),
    (["--learning-rate", "0"], "--learning-rate"),
    (["--batch-size", "0"], "--batch-size"),
    (["--show", "0"], "--show"),
], ids=str)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_written(folder, options, words):
    """Guards: a traceback; training before the error; another model lost."""
    Path("bad.jsonl").write_text(json.dumps(PAIRS[0]) + "\n{\n", encoding="utf-8")
    Path("half.jsonl").write_text('{"prompt": "\\ud800", "completion": "x"}', encoding="utf-8")
    for name, tok in (
        ("chars", CharTokenizer.train("abc")), ("narrow", CharTokenizer.train("abc", [END_OF_TEXT]))
    ):
        config = dataclasses.replace(CONFIG, vocab_size=tok.vocab_size)
        checkpoint.save(Path(name), GPT(config, np.random.default_rng(0)), tok)
    weights = Path("base/model.safetensors").read_bytes()
    data_too = [] if "--data" in options else ["--data", "pairs.jsonl"]
    base = [] if "--init-from" in options else ["--init-from", "base"]
    output = run("sft", *base, *data_too, *options, status=2)
    (line,) = [line for line in output.splitlines() if not line.startswith(("Usage:", "Try ")) and line]
    assert words in line and line.startswith(("tinygpt: ", "Error: "))
    assert Path("base/model.safetensors").read_bytes() == weights
    assert not Path("sft").exists() or not list(Path("sft").iterdir())


def test_what_must_be_given(folder):
    for options, words in (
        (["--init-from", "base"], "give the examples as --data"),
        (["--data", "pairs.jsonl"], "give the model to tune as --init-from"),
        ([], "give the examples as --data and the model to tune as --init-from"),
        (["--init-from", "", "--data", "pairs.jsonl"], "give the model to tune as --init-from"),
        (["--init-from", "base", "--data", ""], "--data is empty"),
    ):
        assert words in run("sft", *options, status=2)


def test_how_far_weights_moved():
    before = {"a": np.float32([3, 4]), "b": np.zeros(2, np.float32), "c": np.zeros(1)}
    after = {"a": np.float32([3, 5]), "b": np.float32([0, 2]), "c": np.zeros(1)}
    total, each = train.weight_change(before, after)
    assert total == pytest.approx(np.sqrt(5) / 5) and each == {"a": 0.2, "b": np.inf, "c": 0.0}


def test_tuning_in_memory_is_the_same_training(folder):
    """Guards: another order, packing or form of the examples than that of a run in a folder."""
    fields = settings("pairs.jsonl", train=TrainConfig(max_iters=5), val_data=("pairs.jsonl",))
    run = runs.begin(sft.SFT, folder / "out", dataclasses.replace(fields, init_from=str(folder / "base")))
    run.train(**runs.saving(run, lambda record: None))
    model, tokenizer = checkpoint.load(folder / "base")
    talks = [e.messages for e in examples.read(["pairs.jsonl"])]
    sft.in_memory(model, tokenizer, talks, dataclasses.replace(fields, data=(), val_data=())).train()
    assert model.flat.tobytes() == run.model.flat.tobytes() and instructions.is_tuned(tokenizer)
