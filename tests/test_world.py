"""The synthetic world: its text, its exact probabilities, its splits, its folder, what is measured by it."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt import checkpoint, cli, data
from tinygpt.cli import main
from tinygpt.errors import UserError
from tinygpt.model import GPT, GPTConfig
from tinygpt.pretrain import Settings
from tinygpt.world import CORPUS, VALIDATION, World, corpus, evaluate, tasks
from tinygpt.world.chance import Sampler, enumerate_documents, logprob, raw_integers
from tinygpt.world.documents import KINDS
from tinygpt.world.words import Attribute, Lexicon

WORLD = World(1337)
TINY = Lexicon(
    women=("Ada",), men=("Bo",), surnames=("Orr", "Poe"),
    attributes=(Attribute("city", ("Rome", "Lima"), ("lives in", "left"), ("Where is {}?",)),
                Attribute("pet", ("cat", "dog"), ("has a",), ("What has {}?",))),
    categories=({"pear": "배"}, {"cat": "고양이", "dog": "개"}, {"hat": "모자"}), adjectives={"red": "빨간"},
    labels=("dax", "wug", "zib"), reviewed=("room", "view"), good=("fine",), bad=("poor", "bad"),
    stations=("Dover", "Luton", "Derby"), lines=("red", "blue"),
)  # fmt: skip


HASHES = {
    "corpus": "9c62b84d8583a52d8d86104352beae62c98678a67e9c7e5bfe738822fe682ae3",
    "tasks": "825570bff67a0b1d64459c2badc5606cca5d9d3637a55edf56d85ca5ca96d7db",
}


def tiny(longest: int = 2) -> World:
    return World(3, lexicon=TINY, known={2: {"eval": 1}, 1: {"eval": 1}}, never={"eval": 1}, longest=longest)


def take(world: World, count: int, stream: int = CORPUS) -> list[tuple[str, str]]:
    return list(itertools.islice(world.documents(stream), count))


# --- the text -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_everywhere():
    """Whoever changes the text on purpose raises VERSION and writes the new hash."""
    text = "\n".join(document for _, document in take(WORLD, 5000))
    assert hashlib.sha256(text.encode()).hexdigest() == HASHES["corpus"]
    sets = json.dumps(tasks.task_sets(WORLD), ensure_ascii=False)
    assert hashlib.sha256(sets.encode()).hexdigest() == HASHES["tasks"]


def test_streams_and_seeds_differ():
    first, other, seed = take(WORLD, 50), take(WORLD, 50, VALIDATION), take(World(1338), 50)
    assert first == take(WORLD, 50) and first != other and first != seed


def test_a_permuted_world_has_the_same_people_and_no_answer_in_common():
    permuted = World(1337, permuted=True)
    for person, other in zip(WORLD.everyone, permuted.everyone, strict=True):
        assert person._replace(values=()) == other._replace(values=())
        assert all(a != b for a, b in zip(person.values, other.values, strict=True))


def test_documents_fit_a_row_and_words_are_tokens():
    """Guards: names and Korean words in pieces, which make recall a spelling task."""
    documents = [document for _, document in take(WORLD, 5000)]
    text = corpus.Corpus(WORLD, documents, documents[:10])
    tokenizer = corpus.train_tokenizer(text, 2048)
    assert tokenizer.vocab_size < 2048  # no pair is left: all words are whole
    assert corpus.rows(documents, tokenizer, 128).weights.mean() > 0.97
    for word in (*WORLD.lexicon.women, *WORLD.lexicon.surnames, *(korean for _, korean in WORLD.nouns)):
        assert len(tokenizer.encode(" " + word)) == 1
    with pytest.raises(UserError, match="give a larger one"):
        corpus.rows(documents, tokenizer, 32)


def test_documents_tell_the_truth():
    """Guards: biographies and judgements that contradict the world."""
    known, values = {p.name: p for p in WORLD.everyone if p.weight > 0}, {}
    for a, attribute in enumerate(WORLD.lexicon.attributes):
        values |= {value: (a, v) for v, value in enumerate(attribute.values)}
    verdict = r"(?:(\? No,|\. Wrong,| - false,) (\w+)|\? Yes|\. Right| - true)"
    claim = re.compile(r"(\w+ \w+) [a-z ]+ (\w+)" + verdict)
    seen = Counter()
    for kind, document in take(WORLD, 3000):
        person = known.get(" ".join(document.split()[:2]))
        if kind == "biography" and person:
            for sentence in document.removesuffix(".").split(". "):
                a, v = values[sentence.split()[-1]]
                assert person.values[a] == v
        if kind == "check" and person:
            for name, claimed, wrong, right in claim.findall(document):
                a, v = values[claimed]
                assert bool(wrong) == (known[name].values[a] != v)
                assert not wrong or values[right] == (a, known[name].values[a])
                seen[bool(wrong)] += 1
    assert 0.4 < seen[True] / seen.total() < 0.6 and seen.total() > 500


def test_people_are_mentioned_as_often_as_their_weight_says():
    told = evaluate.exposures(WORLD, 20_000)
    rates = {
        weight: np.mean([told[p.name] for p in WORLD.everyone if p.weight == weight])
        for weight in (512, 256, 64, 0)
    }
    assert 1.8 < rates[512] / rates[256] < 2.2 and 3 < rates[256] / rates[64] < 5 and rates[0] == 0


# --- probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_the_probabilities_of_all_documents_sum_to_one(n):
    """Enumerated in a tiny world: each is written in one way only, and scored as what it was drawn with."""
    _, _, program = KINDS[n]
    program = partial(program, tiny())
    total, seen = 0.0, set()
    for document, expected in enumerate_documents(program):
        assert document not in seen
        seen.add(document)
        if len(seen) % 50 == 1:
            assert logprob(program, document) == pytest.approx(expected)
            assert logprob(program, document + ".") == logprob(program, document[:-1]) == -math.inf
        total += math.exp(expected)
    assert len(seen) > 3 and total == pytest.approx(1)


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_documents_are_drawn_as_often_as_their_probability_says(n):
    """Guards: a sampler and a scorer that disagree about weights."""
    program = partial(KINDS[n][2], tiny(1))
    c, count = Sampler(raw_integers(5)), 4000
    drawn = Counter()
    for _ in range(count):
        program(c)
        drawn[c.document()] += 1
    for document, times in drawn.most_common(5):
        p = math.exp(logprob(program, document))
        assert abs(times - count * p) < 4 * math.sqrt(count * p)


def test_every_document_of_the_corpus_has_a_probability_and_others_have_none():
    documents = take(WORLD, 1000)
    found = [WORLD.logprob(document) for _, document in documents]
    assert all(-200 < value < 0 for value in found)
    hers = next(d for kind, d in documents if kind == "biography" and " She " in d)
    assert WORLD.logprob(hers.replace(" She ", " He ")) == WORLD.logprob(hers + " ") == -math.inf
    assert WORLD.logprob("") == WORLD.logprob("Nora") == -math.inf


def test_categories_have_the_chances_that_their_docstring_says():
    """The n-th entry is of a kind seen before with probability 1 - (3/4)^(n - 1)."""
    seen, count = np.zeros(8), 0
    kind_of = dict(zip(WORLD.things, WORLD.kind_of_thing, strict=True))
    for kind, document in take(WORLD, 8000):
        if kind == "categories" and ":" in document:
            kinds = [kind_of[entry.split(": ")[0]] for entry in document.split(", ")][:8]
            seen += [kind in kinds[:n] for n, kind in enumerate(kinds)]
            count += 1
    expected = 1 - 0.75 ** np.arange(8)
    assert np.abs(seen / count - expected).max() < 4 * 0.5 / math.sqrt(count)


# --- splits -------------------------------------------------------------------------------------------------


def test_nothing_in_an_evaluation_set_is_in_a_tuning_set():
    sets = tasks.task_sets(WORLD)
    about: dict[str, set] = {}
    for name, items in sets.items():
        split = name.split(".")[1]
        for item in items:
            assert item["meta"]["split"] == split or item["meta"]["split"] == "fresh"
            about.setdefault(split, set()).update(item["meta"]["about"])
    for one, other in itertools.combinations(about, 2):
        assert not about[one] & about[other]
    assert min(len(found) for found in about.values()) > 100


def test_held_out_phrases_and_unknown_people_are_in_no_document():
    text = "\n".join(document for _, document in take(WORLD, 20_000))
    assert any(korean in text for _, korean in WORLD.phrases("seen"))
    for split in ("val", "eval"):
        assert not any(english in text or korean in text for english, korean in WORLD.phrases(split))
    assert not any(person.name in text for person in WORLD.people("never"))
    assert len(WORLD.people("known", "eval")) * 4 * 5 >= 1000  # questions


def test_every_split_has_every_word():
    """Guards: an evaluation on a word that tuning could not have shown."""
    words = {word for english, _ in WORLD.phrases("seen") for word in english.split()}
    assert words == {*WORLD.things, *WORLD.lexicon.adjectives}


# --- tasks --------------------------------------------------------------------------------------------------


def test_answers_are_true():
    people = {person.name: person for person in WORLD.everyone}
    for item in tasks.questions(WORLD, WORLD.people("known", "eval")):
        person = people[item["meta"]["about"][0]]
        values = [a.values[v] for a, v in zip(WORLD.lexicon.attributes, person.values, strict=True)]
        assert item["meta"]["answer"] in values and item["completion"] == item["meta"]["answer"] + "."
    for item in tasks.readings(WORLD, "eval", 50):
        assert item["meta"]["answer"] in item["prompt"].rsplit(". ", 1)[0] + "."
    for item in tasks.journeys(WORLD, "eval", [1, 3], 20):
        start, *lines = item["meta"]["about"][0].split()
        here = WORLD.lexicon.stations.index(start)
        for line in lines:
            here = WORLD.next_station[WORLD.lexicon.lines.index(line)][here]
        assert item["completion"].endswith(f"The answer is {WORLD.lexicon.stations[here]}.")
        assert item["meta"]["steps"] == len(lines) == item["completion"].count("From")


def test_the_styles_of_a_journey_differ_in_the_rides_only():
    found = {s: tasks.journeys(WORLD, "sft", 3, 20, s) for s in ("direct", "steps", "shuffled", "filler")}
    for items in zip(*found.values(), strict=True):
        assert len({(item["prompt"], item["meta"]["answer"]) for item in items}) == 1
        direct, steps, shuffled, filler = (item["completion"] for item in items)
        assert steps.endswith(direct) and shuffled.endswith(direct) and filler.endswith(direct)
        assert steps != shuffled and sorted(steps) == sorted(shuffled)


def test_majority_counts_each_kind_of_question():
    items = [{"meta": {"task": "a", "answer": x}} for x in "xxy"] + [{"meta": {"task": "b", "answer": "z"}}]
    assert tasks.majority(items) == 0.75
    assert 0.4 < tasks.majority(tasks.sentiments(WORLD, "eval", 400)) < 0.6


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_folder_is_the_world_that_was_written(tmp_path):
    written = corpus.draw(World(7, permuted=True), 30, 10)
    corpus.write(tmp_path, written)
    found = corpus.load(str(tmp_path))
    assert found.train == written.train and found.validation == written.validation
    assert found.world.everyone == written.world.everyone and corpus.is_source(str(tmp_path))
    lines = (tmp_path / "tasks" / "question.eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"prompt", "completion", "meta"} == json.loads(lines[0]).keys()
    for damage, words in (
        ('{"version": 99, "seed": 1, "permuted": false}', "version 99"),
        ('{"version": 1, "seed": -1, "permuted": false}', "write the world again"),
        ("[]", "world.json"),
    ):
        (tmp_path / corpus.MARK).write_text(damage)
        with pytest.raises(UserError, match=words):
            corpus.load(str(tmp_path))
    with pytest.raises(UserError, match="seed is a number"):
        corpus.load("world:x")


# --- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    text = corpus.draw(WORLD, 1000, 10)
    tokenizer = corpus.train_tokenizer(text, 2048)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=1, n_head=2, n_embd=16)
    return GPT(config, np.random.default_rng(0)), tokenizer


def test_losses_are_those_of_each_document_alone(untrained):
    model, tokenizer = untrained
    documents = [document for _, document in take(WORLD, 20)]
    for document, loss in zip(documents, evaluate.losses(model, tokenizer, documents), strict=True):
        ids = corpus.encoded(tokenizer, document)[None].astype(np.int32)
        alone = model.loss(ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32))
        assert loss == pytest.approx(alone, rel=1e-5)


def test_a_model_that_knows_nothing_is_above_the_floor_and_recalls_by_chance(untrained):
    model, tokenizer = untrained
    gaps = evaluate.gaps(model, tokenizer, WORLD, 300)
    assert set(gaps) == {kind for kind, _, _ in KINDS} | {"all"}
    assert all(gap.gap > 2 and gap.error < 1 for gap in gaps.values())
    assert sum(gap.tokens for gap in gaps.values()) == 2 * gaps["all"].tokens
    assert evaluate.gaps(None, tokenizer, WORLD, 300)["all"] == gaps["all"]._replace(gap=0, error=0)
    rate = evaluate.recall(model, tokenizer, WORLD, WORLD.people("never", "eval")[:50]).rate()
    assert rate.low < 0.09 and rate.high > 0.03 and rate.n == 50 * 4 * 6


def test_recall_reads_what_a_model_says(untrained):
    """A model whose every answer is one value recalls exactly the people with that value."""
    model, tokenizer = untrained
    model = GPT(model.config, np.random.default_rng(0))
    oslo = tokenizer.encode(" Oslo")[0]
    model.params["ln_f.weight"][:] = 0
    model.params["ln_f.bias"][:] = 1
    model.params["wte.weight"][:] = 0
    model.params["wte.weight"][oslo] = 1
    people = WORLD.people("never", "eval")
    found = evaluate.recall(model, tokenizer, WORLD, people)
    cities = found.attribute == 0
    value = WORLD.lexicon.attributes[0].values.index("Oslo")
    assert (found.chosen[cities] == value).all()
    assert (found.greedy == (cities & (found.right == value))).all()
    assert found.right.tolist()[:6] == [people[0].values[0]] * 6 and (found.nats >= 0).all()




# --- the commands -------------------------------------------------------------------------------------------


def tinygpt(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == status, result.output + str(result.exception)
    return result.output


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder to be in, and a built-in world of few documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "draw", partial(corpus.draw, documents=400, held_out=20))
    monkeypatch.setattr(evaluate, "gaps", partial(evaluate.gaps, count=30))
    monkeypatch.setattr(evaluate, "exposures", lambda world, documents: Counter())
    few = (("--n-layer", "1"), ("--n-head", "1"), ("--n-embd", "8"), ("--max-iters", "6"))
    return [*itertools.chain(*few), "--eval-interval", "2", "--seed", "5"]


def test_a_written_world_and_the_built_in_one_train_the_same_model(small):
    pretrain = ("pretrain", "--data", "world", *small)
    tinygpt(*pretrain, "--out", "a")
    assert tinygpt("world", "--seed", 5, "--documents", 400).count("biography") == 2
    assert "has a world" in tinygpt("world", status=2)
    assert len(Path("world/validation.txt").read_text(encoding="utf-8").splitlines()) == 20
    output = tinygpt(*pretrain, "--out", "b", "--seed", 5)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert "loss above it" in output and "recalled" in output and "(floor 1." in output
    record = json.loads(Path("a/metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_loss"] > record["val_floor"] > 0.8
    settings, _ = checkpoint.read_run(Path("b"), Settings)
    assert settings.train.learning_rate == cli._WORLD["learning_rate"] and settings.block_size == 128


def test_a_resumed_run_on_a_world_is_the_uninterrupted_one(small, monkeypatch):
    tinygpt("pretrain", "--data", "world", *small, "--out", "whole")
    seen = []

    def interrupt(record: dict) -> None:
        seen.append(record)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_progress", lambda n: interrupt)
        assert "--resume cut" in tinygpt("pretrain", "--data", "world", *small, "--out", "cut", status=130)
    tinygpt("pretrain", "--resume", "cut")
    for name in ("model.safetensors", "trainer.safetensors"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def test_each_row_is_trained_on_once_an_epoch():
    """Guards: an order that leaves documents out, and two epochs in the same order."""
    rows = data.Packed(*(np.arange(10)[:, None] * np.ones((1, 3), int) for _ in data.Packed._fields))
    seen = [data.shuffled_rows(rows, 4, step, seed=1).ids[:, 0].tolist() for step in range(5)]
    order = list(itertools.chain(*seen))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert order[:4] != data.shuffled_rows(rows, 4, 0, seed=2).ids[:, 0].tolist()


@pytest.mark.parametrize(("options", "words"), [
    (["--data", "world", "--tokenizer", "char"], "use --tokenizer bpe"),
    (["--data", "world", "--data", "world"], "name one world"),
    (["--data", "world:x"], "seed is a number"),
    (["--data", "world", "--block-size", "16"], "give a larger one"),
])  # fmt: skip
def test_worlds_that_cannot_be_trained_on(small, options, words):
    assert words in " ".join(tinygpt("pretrain", *small, *options, status=2).split())
    assert not Path("out/trainer.safetensors").exists()


def test_the_validation_text_must_be_the_worlds(small):
    """Guards: an infinite floor."""
    tinygpt("world", "--seed", 5, "--documents", 400)
    with open("world/validation.txt", "a", encoding="utf-8") as file:
        file.write("Nora Nobody lives in Atlantis.\n")
    assert "write the world again" in tinygpt("pretrain", "--data", "world", *small, status=2)
