"""In-context learning: prompts, the best possible predictor, controls, scoring; facts told, heads."""

import doctest
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import ops
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint
from tinygpt.shell import inference
from tinygpt.shell.cli import main
from tinygpt.stages import answers as evaluate
from tinygpt.stages import fewshot, recall
from tinygpt.stages.fewshot import Prompt
from tinygpt.text import instructions
from tinygpt.text.examples import Notes
from tinygpt.text.stream import encode_prompt
from tinygpt.text.tokenizer import BPETokenizer
from tinygpt.world import World

WORLD = World(7)


@pytest.fixture(scope="module")
def made():
    words = " ".join([*WORLD.things, *WORLD.lexicon.labels, "User: Assistant: -> ;"])
    tokenizer = BPETokenizer.train([words] * 20, 500, documents=True)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=160, n_layer=2, n_head=4, n_embd=32)
    return GPT(config, np.random.default_rng(0)), tokenizer


# --- prompts ------------------------------------------------------------------------------------------------


def test_doctests():
    outcome = doctest.testmod(fewshot)
    assert outcome.attempted and not outcome.failed


def test_what_the_command_offers_is_what_there_is():
    chosen = [option for option in inference.fewshot.params if hasattr(option.type, "choices")]
    options = {option.name: option.type.choices for option in chosen}
    assert tuple(options["style"]) == (*fewshot.STYLES, "chat")
    assert tuple(options["task"]) == ("mappings", *fewshot.WORLD_TASKS)
    assert tuple(options["control"]) == ("", *fewshot.CONTROLS)


def kinds() -> dict[str, int]:
    return {word: k for k, category in enumerate(WORLD.lexicon.categories) for word in category}


def test_labels_belong_to_kinds_for_one_prompt_only():
    kind = kinds()
    prompts = fewshot.mappings(WORLD, 12, 300)
    for prompt in prompts:
        label_of = {}
        for word, label in (*prompt.examples, (prompt.question, prompt.answer)):
            assert label_of.setdefault(kind[word], label) == label
        assert len(set(label_of.values())) == len(label_of) <= 4
        assert set(label_of.values()) <= set(prompt.choices)
    meant = Counter((kind[prompt.question], prompt.answer) for prompt in prompts)
    assert max(meant.values()) < 0.05 * 300  # of 8 kinds and 16 labels
    assert fewshot.mappings(WORLD, 12, 300) == prompts


def test_more_shots_ask_the_same_and_show_more():
    few, many = fewshot.mappings(WORLD, 3, 50), fewshot.mappings(WORLD, 8, 50)
    for less, more in zip(few, many, strict=True):
        assert more.examples[:3] == less.examples
        assert (more.question, more.answer) == (less.question, less.answer)


@pytest.mark.parametrize("shots", [0, 2, 6])
def test_no_predictor_does_better_than_the_optimal_one(shots):
    """The best one by enumeration: the label of the question's kind, else any that no example has."""
    kind, rng = kinds(), np.random.default_rng(0)
    prompts = fewshot.mappings(WORLD, shots, 4000)
    right = 0
    for prompt in prompts:
        label_of = {kind[word]: label for word, label in prompt.examples}
        free = [label for label in prompt.choices if label not in label_of.values()]
        guess = label_of.get(kind[prompt.question]) or free[rng.integers(len(free))]
        right += guess == prompt.answer
        assert prompt.optimal == (1.0 if kind[prompt.question] in label_of else 1 / len(free))
    best = np.mean([prompt.optimal for prompt in prompts])
    shown = 1 - 0.75**shots
    assert best == pytest.approx(shown + (1 - shown) / 14, abs=0.02)
    assert right / 4000 == pytest.approx(best, abs=3 * math.sqrt(best * (1 - best) / 4000) + 1e-9)


def test_controls():
    kind, plain = kinds(), fewshot.mappings(WORLD, 8, 300)
    unseen = fewshot.mappings(WORLD, 8, 300, "unseen")
    assert not any(p.question in dict(p.examples) for p in unseen)
    assert any(p.question in dict(p.examples) for p in plain)
    for one, other in zip(plain, fewshot.mappings(WORLD, 8, 300, "reordered"), strict=True):
        assert Counter(one.examples) == Counter(other.examples) and one[1:] == other[1:]
    again = fewshot.mappings(WORLD, 8, 300, "reordered")
    assert sum(a.examples == b.examples for a, b in zip(plain, again, strict=True)) < 5
    changed = fewshot.mappings(WORLD, 8, 300, "shuffled")
    assert sum(a.examples == b.examples for a, b in zip(plain, changed, strict=True)) < 5
    right = total = 0
    for one, other in zip(plain, changed, strict=True):
        assert [word for word, _ in one.examples] == [word for word, _ in other.examples]
        assert math.isnan(other.optimal)
        label_of = {kind[word]: label for word, label in one.examples}
        right += sum(label == label_of[kind[word]] for word, label in other.examples)
        total += 8
    assert right / total == pytest.approx(1 / 4, abs=0.05)


@pytest.mark.parametrize("task", fewshot.WORLD_TASKS)
def test_examples_are_for_tuning_and_questions_are_not(task):
    """Guards: a question whose answer an example gives away; examples of another kind than the question."""
    learned = {(q, a) for _, _, q, a, _ in fewshot.WORLD_TASKS[task](WORLD, "sft")}
    held_out = {(q, a) for _, _, q, a, _ in fewshot.WORLD_TASKS[task](WORLD, "eval")}
    assert not {q for q, _ in learned} & {q for q, _ in held_out}
    prompts = fewshot.from_world(WORLD, task, 3, 10_000)
    abouts = {about for _, about, *_ in fewshot.WORLD_TASKS[task](WORLD, "eval")}
    assert len(prompts) == len(abouts)  # a fact is asked for once, whatever the number of wordings
    for prompt in prompts[:50]:
        assert set(prompt.examples) <= learned and (prompt.question, prompt.answer) in held_out
        if prompt.choices:
            assert {answer for _, answer in prompt.examples} | {prompt.answer} <= set(prompt.choices)


def own(path, made) -> tuple[list, Notes]:
    notes = Notes()
    return fewshot.read(path, *made, "arrow", notes), notes


def test_own_tasks(tmp_path, made):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(9)]
    rows[4]["choices"] = ["5", "6"]
    useless = [{"prompt": "no answer", "completion": " "}, {"prompt": "too long " * 99, "completion": "b"}]
    path.write_text("\n".join(map(json.dumps, rows + useless)) + "\n\n")
    read, notes = own(path, made)
    assert str(notes).splitlines() == [
        f"Left out, as an answer is empty: 1, the first is {path}:10",
        f"Left out, as longer than the 160 positions of the model: 1, the first is {path}:11",
    ]
    prompts = fewshot.from_file(read, 3, 100)
    assert sorted(prompt.question for prompt in prompts) == sorted(row["prompt"] for row in rows)
    for prompt in prompts:
        pairs = (*prompt.examples, (prompt.question, prompt.answer))
        assert len(set(pairs)) == 4 and all(int(a) == int(q[0]) + 1 for q, a in pairs)
        assert prompt.choices == (("5", "6") if prompt.question == "4 + 1" else ())
    assert len(fewshot.from_file(read, 3, 5)) == 5 and fewshot.from_file(read, 3, 100) == prompts
    assert fewshot.from_file(read, 3, 100, seed=1) != prompts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "completion": "b"}\nnonsense', "own.jsonl:2: is not JSON"),
        ('{"prompt": "a"}', "own.jsonl:1: has .'prompt'.: a line is"),
        ('{"prompt": "a", "completion": " "}', "an answer is empty: 1, the first is .*own.jsonl:1"),
        ('{"prompt": "a", "completion": "b", "choices": ["c"]}', "own.jsonl:1: the answer 'b' is none"),
        ('{"prompt": "a", "completion": "b", "choices": "b"}', "own.jsonl:1: choices is 'b'"),
        ('{"prompt": 1, "completion": "b"}', "own.jsonl:1: prompt is 1"),
        ('{"prompt": "a", "completion": "b"}', "1 lines are too few for 1 examples"),
        ("\ud800", "is not UTF-8"),
    ],
)
def test_mistakes_in_a_file_are_told_by_line(tmp_path, made, text, words):
    (tmp_path / "own.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=words):
        fewshot.from_file(own(tmp_path / "own.jsonl", made)[0], 1, 10)


# --- asking -------------------------------------------------------------------------------------------------


def test_the_chosen_are_the_likeliest(made):
    model, tokenizer = made
    prompts = fewshot.mappings(WORLD, 2, 30)
    results = fewshot.likeliest(model, tokenizer, prompts, "colon")
    assert len(set(results)) > 1
    for prompt, sentences in list(zip(prompts, results, strict=True))[::6]:
        start_ids = encode_prompt(tokenizer, fewshot.text(prompt, "colon"))
        nats = []
        for choice in prompt.choices:
            ids = np.concatenate([start_ids, tokenizer.encode(f" {choice}")])[None]
            weights = (np.arange(ids.size - 1) >= len(start_ids) - 1)[None].astype(np.float32)
            nats.append(model.loss(ids[:, :-1], ids[:, 1:], weights))
        assert sentences == prompt.choices[int(np.argmin(nats))]


def test_what_is_written_is_cut_where_an_answer_ends(made, monkeypatch):
    model, tokenizer = made
    texts = iter(["wug; apple -> dax", "wug.", "wug, dax", " wug"])
    monkeypatch.setattr(fewshot, "answers", lambda *args: [evaluate.Answer(next(texts), True)])
    prompt = [Prompt((), "dog", "wug", ("wug", "dax"))]
    rates = [fewshot.accuracy(model, tokenizer, prompt, style, True).rate
             for style in ("arrow", "chat", "table", "colon")]  # fmt: skip
    assert rates == [1, 1, 1, 1]
    monkeypatch.setattr(fewshot, "answers", lambda *args: [evaluate.Answer("wugs", True)])
    assert fewshot.accuracy(model, tokenizer, prompt, "arrow", True).rate == 0
    assert fewshot.accuracy(model, tokenizer, [prompt[0]._replace(choices=())], "arrow").rate == 0


def test_chat_has_the_examples_as_earlier_turns(made):
    _, tokenizer = made
    prompt = Prompt((("apple", "dax"), ("dog", "wug")), "pear", "dax")
    turns = [*instructions.pair("apple", "dax"), *instructions.pair("dog", "wug")]
    expected = instructions.prompt(tokenizer, [*turns, {"role": "user", "content": "pear"}])
    assert fewshot.encoded(tokenizer, prompt, "chat").tolist() == expected.tolist()


def test_the_command(made, tmp_path):
    model, tokenizer = made
    checkpoint.save(tmp_path, model, tokenizer)

    def ask(*more):
        return CliRunner().invoke(main, ["fewshot", str(tmp_path), "--count", "20", *more])

    result = ask("--data", "world:7", "--shots", "0", "--shots", "2")
    assert result.exit_code == 0, result.output
    first, *rows = result.output.splitlines()[:3]
    assert first.split() == ["examples", "right", "95%", "interval", "of", "best", "possible"]
    best = np.mean([p.optimal for p in fewshot.mappings(WORLD, 2, 20)])
    rate = fewshot.accuracy(model, tokenizer, fewshot.mappings(WORLD, 2, 20)).rate
    assert rows[1].split()[:2] == ["2", f"{rate:.3f}"] and rows[1].endswith(f"{best:.3f}")
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": str(n), "completion": "dax"}) + "\n" for n in range(5)))
    assert "dax" in ask("--data", str(own), "--shots", "1").output
    own.write_text("".join(json.dumps({"prompt": "a" * 60, "completion": "dax"}) + "\n" for n in range(5)))
    result = ask("--data", str(own), "--shots", "0", "--shots", "4")  # with four examples 300 letters
    assert result.exit_code == 0 and "With 4 examples no prompt fits the 160 positions" in result.output
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(own.read_text() + json.dumps({"prompt": "b", "completion": "x", "choices": ["x", "y"]}))
    for more, words in (
        (("--data", str(mixed)), "only 1 of 6 lines have choices: add them, or give --free"),
        ((), "was trained on no world: give questions as --data FILE"),
        (("--data", "world:7", "--shots", "60"), "longer than the 160 positions of the model"),
        (("--data", str(own), "--control", "unseen"), "--control is for --task mappings"),
        (("--data", str(tmp_path / "none.jsonl")), "none.jsonl: no such file"),
    ):
        result = ask(*more)
        assert result.exit_code == 2 and words in result.output, result.output


# --- the two memories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rival", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
def test_what_is_told_is_told_so_often_and_asked_in_other_words(made, monkeypatch, own, repeats, rival):
    """Guards: a wording that was used already, which is copying; an own value beside the false one."""
    queries, people = [], WORLD.people("known", "eval")[:20]
    noted = lambda tokenizer, text: queries.append(text) or np.zeros(1, int)  # noqa: E731
    monkeypatch.setattr(recall, "encode_prompt", noted)
    monkeypatch.setattr(
        recall, "likelihoods", lambda m, prompts, options: [np.arange(len(o)) * 1.0 for o in options]
    )
    results = recall.memories(*made, WORLD, people, repeats, agrees=own, rival=rival)
    attributes = WORLD.lexicon.attributes
    assert len(queries) == results.prompt.n == 20 * len(attributes)
    nats, places = 0.0, set()
    for n, text in enumerate(queries):
        person, a = people[n // len(attributes)], n % len(attributes)
        *facts, last = text.split(". ")
        others = [fact for fact in facts if not fact.startswith(f"{person.name} ")]
        facts = [fact for fact in facts if fact not in others]
        places.add(text.split(". ").index(others[0]) if rival else 0)
        words = last.removeprefix(f"{person.name} ")
        assert words in attributes[a].wordings and not any(f" {words} " in fact for fact in facts)
        session = [fact for fact in facts if any(f" {t} " in fact for t in attributes[a].wordings)]
        values = {next(v for v in attributes[a].values if fact.endswith(f" {v}")) for fact in session}
        mine = attributes[a].values[person.values[a]]
        assert len(session) == repeats and len(facts) == repeats + 2 and len(values) == 1
        assert (values == {mine}) == own and len(others) == rival
        for other in others:  # the same kind of fact about somebody else, with another value
            assert any(other.startswith(f"{p.name} ") for p in people)
            (value,) = (v for v in attributes[a].values if other.endswith(f" {v}"))
            assert any(f" {t} " in other for t in attributes[a].wordings) and value not in values
        nats += attributes[a].values.index(*values) - person.values[a]
    assert results.nats == pytest.approx(nats / len(queries))
    assert len(places) == (repeats + 3 if rival else 1)  # it stands anywhere before the question
    last = [len(attribute.values) - 1 for attribute in attributes]
    share = np.mean([value == last[a] for person in people for a, value in enumerate(person.values)])
    assert results.weights.rate == pytest.approx(share) and (not own or results.prompt == results.weights)


def test_attention_is_what_the_model_computes(made):
    """Guards: maps of another layer, or of another head, than the one knocked out."""
    model = GPT(made[0].config, np.random.default_rng(1), np.float64)
    ids = np.random.default_rng(0).integers(200, size=(2, 9)).astype(np.int32)
    maps, logits = recall.attention(model, ids), model.forward(ids)[0].copy()
    assert maps.shape == (2, 2, 4, 9, 9)
    np.testing.assert_allclose(maps.sum(-1), 1)
    assert not np.triu(maps, 1).any()

    def uniform(q, k, v, n_head, *rest):
        """Attention in which one head of one layer looks at nothing."""
        out, cache = ops.attention_forward(q, k, v, n_head, *rest)
        calls.append(1)
        if len(calls) == 2:
            out[..., 16:24] = 0
        return out, cache

    calls = []
    cut = recall.without(model, [(1, 2)])
    assert not np.allclose(cut.forward(ids)[0], logits, atol=1e-3)
    silent = GPT(model.config, None, np.float64)
    silent.flat[:] = model.flat
    silent.ops = SimpleNamespace(**vars(ops) | {"attention_forward": uniform})
    np.testing.assert_allclose(cut.forward(ids)[0], silent.forward(ids)[0], atol=1e-12)
    np.testing.assert_array_equal(model.forward(ids)[0], logits)


def test_a_head_that_looks_where_induction_looks_has_the_score_one(monkeypatch, made):
    model = made[0]
    maps = np.zeros((2, 50, 4, 50, 50))
    maps[..., 0] = 1
    for t in range(25, 50):
        maps[1, :, 3, t] = np.eye(50)[t - 24]  # what followed the same token
        maps[0, :, 1, t] = np.eye(50)[t - 25]  # the same token
        maps[0, :, 2, t] = np.eye(50)[t - 1]  # the token before
    records = []
    monkeypatch.setattr(recall, "attention", lambda model, ids: records.append(ids) or maps)
    scores = recall.induction_scores(model, range(100, 200))
    assert scores.shape == (2, 4) and scores[1, 3] == 1 and np.count_nonzero(scores) == 1
    back = recall.previous_scores(model, range(100, 200))
    assert back[0, 2] == 1 and np.count_nonzero(back) == 1
    assert (records[0][:, :25] == records[0][:, 25:]).all() and records[0].min() >= 100
    assert all(len(set(row)) == 25 for row in records[0].tolist())


def test_other_heads_are_others():
    heads = [(1, 0), (1, 3)]
    sets = recall.others((2, 4), heads, 30)
    assert len(sets) == 30 and all(len(set(some)) == 2 and not set(some) & set(heads) for some in sets)
    assert {head for some in sets for head in some} == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2)}
    spared = recall.others((2, 4), heads, 30, [(0, 0), (1, 2)])
    assert {head for some in spared for head in some} == {(0, 1), (0, 2), (0, 3), (1, 1)}


def test_a_choice_that_begins_with_another_can_be_chosen(made, monkeypatch):
    """Guards: "1" before "10" whatever the model says, as what begins a text is never less likely."""
    model, tokenizer = made
    prompt = [Prompt((), "dog", "dax wug", ("dax", "dax wug"))]
    records = []

    def likelihoods(model, prompts, choices) -> list:
        records.append([tokenizer.decode(ids) for ids in choices[0]])
        return [np.array([-2.0, -1.0])]

    monkeypatch.setattr(fewshot, "likelihoods", likelihoods)
    assert fewshot.likeliest(model, tokenizer, prompt, "table") == ["dax wug"]
    assert records[-1] == [" dax,", " dax wug,"]
    fewshot.likeliest(model, tokenizer, prompt, "chat")
    assert records[-1] == [" dax<|endoftext|>", " dax wug<|endoftext|>"]
    fewshot.likeliest(model, tokenizer, [prompt[0]._replace(choices=("dax", "wug dax"))], "table")
    assert records[-1] == [" dax", " wug dax"]
