"""The reward model: its loss, where a score is read, what it learns, how it is judged, its file."""

import dataclasses
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.train import TrainConfig
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint, runs
from tinygpt.shell import label
from tinygpt.shell.cli import main
from tinygpt.stages import reward, rlhf
from tinygpt.stages.answers import Answer
from tinygpt.stages.reward import Comparison, Judge, Settings
from tinygpt.stages.variants import build
from tinygpt.text import instructions, stream
from tinygpt.text.tokenizer import BPETokenizer
from tinygpt.world import World, raw_integers, tasks

WORDS = "red green blue black white"
CONFIG = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(f"User: Assistant: What is it? {WORDS} " * 9, 300)


def make(dtype=np.float32) -> GPT:
    return reward.with_head(GPT(CONFIG, np.random.default_rng(0), dtype), 1)


def judging(tokenizer: BPETokenizer, own: str = "green", dtype=np.float32) -> Judge:
    """A judge whose author always answers the same."""
    judge = Judge(make(dtype), GPT(CONFIG, np.random.default_rng(0), dtype), tokenizer)
    judge.thoughts = dict.fromkeys(["What is it?", "What is it?What is it?"], own)
    return judge


def settings(**changes) -> Settings:
    train = TrainConfig(max_iters=60, learning_rate=3e-3, min_lr=3e-4, warmup_iters=5)
    return Settings(model=make().config, train=train, block_size=64, batch_size=16, **changes)


def test_bradley_terry(rng):
    chosen, rejected = rng.standard_normal((2, 5))
    loss, dc, dr = reward.bradley_terry(chosen, rejected)
    by_hand = [-math.log(1 / (1 + math.exp(r - c))) for c, r in zip(chosen, rejected, strict=True)]
    assert loss == pytest.approx(np.mean(by_hand))
    for n in range(5):
        for d, sides in ((dc, (chosen, rejected)), (dr, (rejected, chosen))):
            eps = np.eye(5)[n] * 1e-6
            more, less = (reward.bradley_terry(*(p if d is dc else p[::-1]))[0]
                          for p in ((sides[0] + eps, sides[1]), (sides[0] - eps, sides[1])))  # fmt: skip
            assert d[n] == pytest.approx((more - less) / 2e-6, abs=1e-8)
    huge = reward.bradley_terry(np.array([-1e4]), np.array([1e4]))
    assert huge[0] == 2e4 and huge[1] == -1


def test_the_gradient_of_the_loss(tokenizer):
    """Of packed comparisons, by all weights: against differences."""
    model = make(np.float64)
    model.params["score.weight"] *= 20
    texts = judging(tokenizer).texts(["What is it?"] * 4, WORDS.split()[:4])
    rows = reward.marked(texts, 64)
    optimizer = TrainConfig().optimizer(model)
    value = lambda: reward.loss(optimizer, [rows])  # noqa: E731
    value()
    grad, start = optimizer.flat.copy(), model.flat.copy()
    for direction in np.random.default_rng(0).standard_normal((3, model.flat.size)):
        direction /= math.sqrt(model.flat.size)
        sides = []
        for sign in (1, -1):
            model.flat[:] = start + sign * 1e-5 * direction
            sides.append(value())
        assert grad @ direction == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_a_score_is_read_at_the_last_token_whatever_stands_beside_it(tokenizer):
    """Guards: reading at padding, at another text's end, and an order of packing taken for that of texts."""
    judge = judging(tokenizer, dtype=np.float64)
    questions = ["What is it?" * (n % 2 + 1) for n in range(8)]
    answers = [WORDS[: 3 * n + 1] for n in range(8)]
    texts, model = judge.texts(questions, answers), judge.model
    results = judge(questions, answers)
    assert len(set(np.round(results, 12))) == 8
    for ids, score in zip(texts, results, strict=True):
        assert score == pytest.approx(model.forward(ids[None])[0][0, -1, 0], abs=1e-12)
        padded = np.concatenate([ids, np.full(5, tokenizer.eos_id)])[None]
        assert model.forward(padded)[0][0, len(ids) - 1, 0] == pytest.approx(score, abs=1e-12)
    np.testing.assert_allclose(reward.scores(model, texts[::-1]), results[::-1], atol=1e-12)


def test_the_judge_answers_itself_before_it_looks(tokenizer, monkeypatch):
    """Guards: the own answer to another question, one asked for twice, one by the trained weights."""
    judge, calls = judging(tokenizer), []
    judge.thoughts = {}

    def answers(model, tokenizer, prompts, most) -> list[Answer]:
        assert model is judge.author
        calls.extend(tokenizer.decode(ids) for ids in prompts)
        return [Answer("black" if "What?" in tokenizer.decode(ids) else "red", True) for ids in prompts]

    monkeypatch.setattr(reward, "answers", answers)
    texts = judge.texts(["What is it?", "What?", "What is it?"], ["blue", "red", "red"])
    text = "<|endoftext|>User: What?\nAssistant: black<|endoftext|>Assistant: red<|endoftext|>"
    assert tokenizer.decode(texts[1]) == text and texts[1][-1] == tokenizer.eos_id
    assert "Assistant: red<|endoftext|>Assistant: blue" in tokenizer.decode(texts[0])
    judge.texts(["What?"], ["blue"])
    assert calls == [f"<|endoftext|>User: {q}\nAssistant:" for q in ("What is it?", "What?")]


def test_a_deaf_judge_and_an_answer_longer_than_a_judge_can_read(tokenizer):
    """Guards: a control that hears, a policy's babble that ends a run."""
    judge, questions = judging(tokenizer), ["What is it?"] * 2
    first, other = judge(questions, ["red", "blue"])
    assert first != other and judge.deaf()(questions, ["red", "blue"]).tolist() == [0, 0]
    assert judge(questions, ["red", "blue"]).tolist() == [first, other]  # is as it was
    long = judge.texts(questions[:1], [WORDS * 9])[0]
    assert len(long) > judge.model.context
    start_ids = reward.scores(judge.model, [long[: judge.model.context]])
    assert judge(questions[:1], [WORDS * 9])[0] == start_ids[0]


def comparisons(count: int, seed: int, slips: float = 0.0) -> list[Comparison]:
    """Whoever is earlier in WORDS is better; some are labelled the wrong way."""
    rng, words, results = np.random.default_rng(seed), WORDS.split(), []
    for _ in range(count):
        a, b = sorted(rng.choice(5, 2, replace=False))
        pair, is_right = [words[a], words[b]], rng.random() >= slips
        pair = pair if is_right else pair[::-1]
        results.append(Comparison("What is it?", *pair, kind=f"{b - a} apart", is_right=is_right))
    return results


def in_memory(judge: reward.Judge, pairs: list[Comparison]) -> reward.Reward:
    return reward.in_memory(judge.author, judge.tokenizer, pairs, settings())


def test_it_learns_what_is_better_also_from_an_annotator_who_slips(tokenizer):
    """Guards: a sign, a judgement against the labels instead of the truth."""
    stage = in_memory(judging(tokenizer), comparisons(400, 0, slips=0.15))
    judge = stage.judge
    before = reward.judged(judge, comparisons(200, 1))
    stage.train()
    after = reward.judged(judge, comparisons(200, 1))
    assert before.right.rate < 0.9 < after.right.rate and after.labels_right == 1 and after.margin > 0.5
    assert sum(rate.n for rate in after.by_kind.values()) == 200 and set(after.by_kind) == {
        f"{n} apart" for n in range(1, 5)
    }
    slipped = reward.judged(judge, comparisons(400, 0, slips=0.15))
    assert slipped.right.rate > 0.9 and slipped.labels_right == pytest.approx(0.85, abs=0.05)
    # A score of 0.15 against 0.85 is what the labels are worth.
    assert slipped.calibration < 0.15


def test_shuffled_labels_teach_nothing(tokenizer):
    stage = in_memory(judging(tokenizer), comparisons(400, 0, slips=0.5))
    stage.train()
    results = reward.judged(stage.judge, comparisons(200, 1))
    assert results.margin < 0.5


def test_calibration_is_the_distance_from_what_was_labelled(tokenizer, monkeypatch):
    """An overconfident judge: sure to 0.88, and right in half of the cases."""
    pairs = [Comparison("What is it?", "red", "blue", is_right=n % 2 == 0) for n in range(10)]
    scores = np.array([[1.0, -1.0] if n % 2 else [-1.0, 1.0] for n in range(10)]).ravel()
    monkeypatch.setattr(reward, "scores", lambda *args: scores)
    results = reward.judged(judging(tokenizer), pairs)
    assert results.right.rate == 0 and results.calibration == pytest.approx(1 / (1 + math.exp(-2)) - 0.5)


def test_batches_go_through_all_comparisons_anew_in_each_epoch(tokenizer):
    pairs = [(np.array([n, 1]), np.array([n, 2])) for n in range(10)]
    s = dataclasses.replace(settings(), batch_size=4)
    records = [reward.batch(pairs, s, n) for n in range(5)]
    firsts = []
    for rows in records:
        ends = reward.ends(rows.weights)
        assert rows.ids.ravel()[ends].tolist() == [1, 2] * 4
        firsts += rows.ids.ravel()[ends[::2] - 1].tolist()
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(10)) and firsts[:10] != firsts[10:]


def test_a_run_and_its_folder(tokenizer, tmp_path):
    base, data = GPT(CONFIG, np.random.default_rng(0)), tmp_path / "pairs.jsonl"
    checkpoint.save(tmp_path / "untuned", base, tokenizer)
    tokenizer.chat_template = instructions.TEMPLATE
    checkpoint.save(tmp_path / "base", base, tokenizer)
    rows = [{"prompt": f"{n % 10} {c.prompt}", "chosen": c.chosen, "rejected": c.rejected}
            for n, c in enumerate(comparisons(60, 0))]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, rows)))
    s = dataclasses.replace(settings(data=(str(data),)), model=CONFIG, init_from=str(tmp_path / "base"))
    records = []
    with pytest.raises(UserError, match="has a model that this run needs as it is"):
        runs.begin(reward.Reward, tmp_path / "base", s, overwrite=True)
    old = build(dataclasses.replace(CONFIG, post_norm=True))
    checkpoint.save(tmp_path / "old", old, tokenizer)
    with pytest.raises(UserError, match="has GPT-1's blocks; a reward model has GPT-2's"):
        runs.begin(reward.Reward, tmp_path / "new", dataclasses.replace(s, init_from=str(tmp_path / "old")))
    with pytest.raises(UserError, match="was not tuned to instructions"):  # as `tinygpt rlhf` says later
        untuned = dataclasses.replace(s, init_from=str(tmp_path / "untuned"))
        runs.begin(reward.Reward, tmp_path / "new", untuned)
    stage = runs.begin(reward.Reward, tmp_path / "judge", s)
    assert len(stage.val) == 6 and len(stage.pairs) == 54
    texts = {ids.tobytes() for pair in stage.pairs for ids in pair}
    assert not texts & {ids.tobytes() for ids in stage.judge.texts(*reward._sides(stage.val))}
    stage.train(**runs.saving(stage, records.append))
    assert records[-1]["val_right"] > 0.6 and records[-1]["train_loss"] < records[0]["train_loss"]
    model, again = checkpoint.load(tmp_path / "judge", judge=True)
    assert model.config.num_labels == 1 and again.chat_template == instructions.TEMPLATE
    np.testing.assert_array_equal(model.flat, stage.model.flat)
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and len(config["id2label"]) == 1
    assert config["pad_token_id"] != tokenizer.eos_id  # at which scores are read
    with pytest.raises(UserError, match="has a reward model, which judges answers; here a model that writes"):
        checkpoint.load(tmp_path / "judge")
    with pytest.raises(UserError, match="has a model that writes; here a reward model"):
        checkpoint.load(tmp_path / "base", judge=True)
    queries = ["What is it?", "What is it? "], ["red", "blue"]
    np.testing.assert_array_equal(runs.load_judge(tmp_path / "judge")(*queries), stage.judge(*queries))
    resumed = runs.resume(reward.Reward, tmp_path / "judge")
    np.testing.assert_array_equal(resumed.model.flat, model.flat)
    data.write_text(data.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match="not the data that this run began with"):
        runs.resume(reward.Reward, tmp_path / "judge")
    checkpoint.save(tmp_path / "base", GPT(CONFIG, np.random.default_rng(1)), tokenizer)
    with pytest.raises(UserError, match="has another model than the base of this run"):
        runs.load_judge(tmp_path / "judge")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="this judge needs the model with which"):
        runs.load_judge(tmp_path / "judge")


def test_accumulated_batches_count_for_three_passes(tmp_path):
    """Guards: 15 passes through the comparisons with five batches an update."""
    rows = [{"prompt": f"{n}", "chosen": "red", "rejected": "blue"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"max_iters": None, "batch_size": 4, "gradient_accumulation_steps": 5, "warmup_iters": 100,
               "data": [str(tmp_path / "pairs.jsonl")], "learning_rate": 1e-3, "min_lr": None,
               "block_size": 8}  # fmt: skip
    reward.Reward.complete(options, set(), CONFIG, None)
    assert options["max_iters"] == 3 * 60 / (4 * 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", r"x.jsonl:1: has \[\]: a line is"), ("3", "x.jsonl:1: is 3, not an object"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n[]', "x.jsonl:2: is "),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "x.jsonl:1: rejected is 3: it must be"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b "}', "no example can be used.*rejected are the same"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_told_by_line(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        reward.read_file(tmp_path / "x.jsonl")


def test_a_person_compares_answers_and_goes_on_later(tokenizer, tmp_path, monkeypatch):
    """Guards: a comparison that is lost by stopping, a key that means the other answer."""

    def sample(model, tokenizer, prompts, count, length, rng, temperature) -> SimpleNamespace:
        return SimpleNamespace(answers=[f"{word}{rng.integers(1000)}" for word in ("red", "red", "blue")])

    monkeypatch.setattr(label, "sample", sample)
    model = GPT(CONFIG, np.random.default_rng(0))
    tokenizer.chat_template = None
    checkpoint.save(tmp_path / "base", model, tokenizer)
    refused = CliRunner().invoke(main, ["label", str(tmp_path / "base"), "--data", "world:5"])
    assert refused.exit_code == 2 and "run tinygpt sft first" in refused.output
    tokenizer.chat_template = instructions.TEMPLATE
    checkpoint.save(tmp_path / "tuned", model, tokenizer)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is it?"}\n{"prompt": "What?"}\n')
    out = tmp_path / "comparisons.jsonl"
    command = ["label", str(tmp_path / "tuned"), "--data", str(tmp_path / "prompts.jsonl"), "--out", str(out)]
    result = CliRunner().invoke(main, command, input="1x2sq")
    assert result.exit_code == 0 and "2 comparisons in" in result.output, result.output
    assert result.output.startswith("1 or 2: the better one; s: skip; q: stop\n")
    assert result.output.count("q: stop") == 2  # once more after the x
    shown = re.findall(r"\n\d\. (.*)\n  1  (.*)\n  2  (.*)\n", result.output)
    assert len(shown) == 4
    results = reward.read_file(out)
    assert [tuple(c[:3]) for c in results] == [shown[0], (shown[1][0], shown[1][2], shown[1][1])]
    CliRunner().invoke(main, command, input="1\x03")
    assert reward.read_file(out)[:2] == results and len(reward.read_file(out)) == 3

    session = CliRunner().invoke(main, ["label", str(tmp_path / "tuned"), "--data", "world:5"], input="q")
    true = {item["prompt"]: item["completion"] for item in rlhf.read_prompts("world:5")}
    queries, sentences = re.search(r"\n1\. (.*)\n.*\n.*\n     \(true: (.*?\.)[ )]", session.output).groups()
    assert true[queries] == sentences

    out.unlink()  # what was skipped makes it begin earlier than it came: nothing is asked for twice
    for keys in ("ss121q", "121q"):
        CliRunner().invoke(main, command, input=keys)
    rows = [(c.prompt, frozenset((c.chosen, c.rejected))) for c in reward.read_file(out)]
    assert len(rows) == len(set(rows)) == 6

    monkeypatch.setattr(label, "sample", lambda *args: SimpleNamespace(answers=["red"]))
    out.unlink()
    result = CliRunner().invoke(main, command, input="1111")
    assert "\n0 comparisons in" in result.output and not out.exists()
    for done in (2, 2):  # a refusal, if the user names one, is compared once to each prompt
        result = CliRunner().invoke(main, [*command, "--refusal", "No idea."], input="1111")
        assert "There is nothing left to compare" in result.output
        assert f"\n{done} comparisons in" in result.output
    assert {c.rejected for c in reward.read_file(out)} == {"No idea."}


def test_a_model_that_says_one_thing_is_asked_again_more_freely(tokenizer, tmp_path, monkeypatch):
    """Guards: "I do not know." in the comparisons of a user whose model says that nowhere."""
    model, temperatures = GPT(CONFIG, np.random.default_rng(0)), []
    tokenizer.chat_template = instructions.TEMPLATE
    checkpoint.save(tmp_path / "tuned", model, tokenizer)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is it?"}')

    def sample(*args) -> SimpleNamespace:
        temperatures.append(args[-1])
        return SimpleNamespace(answers=["red", "blue"] if args[-1] > 1.5 else ["red", "red"])

    monkeypatch.setattr(label, "sample", sample)
    options = ["--data", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    CliRunner().invoke(main, ["label", str(tmp_path / "tuned"), *options], input="1")
    assert temperatures[:3] == [1.0, 1.5, 2.0]
    (comparison,) = reward.read_file(tmp_path / "out.jsonl")
    assert comparison[:3] == ("What is it?", "red", "blue")


def test_people_compare_what_the_model_may_come_to_say(tokenizer, monkeypatch):
    """Guards: answers to another question, only what a tuned model says, a slip that is counted as none."""
    world = World(5)
    people = world.people("known", "rl")[:3] + world.people("never", "rl")[:3]
    items = tasks.questions(world, people)
    true = {item["prompt"]: (item["completion"], item["meta"]["exposure"] > 0) for item in items}

    def generate(model, prompts, length, **how) -> list[np.ndarray]:
        queries = (tokenizer.decode(ids).split("User: ")[1].removesuffix("\nAssistant:") for ids in prompts)
        return [np.append(tokenizer.encode(f" {true[query][0]}"), tokenizer.eos_id) for query in queries]

    monkeypatch.setattr(stream, "generate", generate)
    results = reward.collect(make(), tokenizer, world, people, 2000, error=0.2, seed=3)
    assert abs(np.mean([c.is_right for c in results]) - 0.8) < 0.03
    kinds = Counter(c.kind for c in results)
    assert set(kinds) == {
        "right over wrong", "right over don't know", "right over garbled", "don't know over wrong",
        "don't know over garbled",
    }  # fmt: skip
    for c in results:
        better, worse = (c.chosen, c.rejected) if c.is_right else (c.rejected, c.chosen)
        completion, known = true[c.prompt]
        assert c.kind.startswith("right") == (known and better == completion)
        assert c.kind.startswith("don't") == (better == tasks.REFUSAL)
        assert c.kind.endswith("garbled") == (tasks.form(world, "question").fullmatch(worse) is None)
    assert {c.prompt for c in results} == set(true)
    assert results == reward.collect(make(), tokenizer, world, people, 2000, error=0.2, seed=3)


def test_garbled_has_a_word_twice_or_none():
    integers = raw_integers(0, 1, 2)
    results = {reward._garbled("I do not know.", integers) for _ in range(200)}
    assert results == {
        "do not know.", "I not know.", "I do know.", "I do not", "I I do not know.", "I do do not know.",
        "I do not not know.", "I do not know. know.",
    }  # fmt: skip
    assert reward._garbled("Oslo.", integers) == "Oslo. Oslo."
