"""The synthetic world: its text, its exact probabilities, its splits, its folder, what is measured by it."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import train
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint, runs
from tinygpt.shell import training, worlds
from tinygpt.shell.cli import main
from tinygpt.stages import evaluate, recipes, sft
from tinygpt.stages.answers import Answer, wilson
from tinygpt.stages.pretrain import Settings
from tinygpt.text import data, instructions
from tinygpt.text.tokenizer import BPETokenizer
from tinygpt.world import CORPUS, VALIDATION, World, corpus, preferences, tasks
from tinygpt.world.chance import END, Reader, Sampler, logprob, raw_integers
from tinygpt.world.documents import KINDS, _hidden
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
    "corpus": "2762f17b679e47b48eb03bf94382e14b5ee38f7f5132d36d5c3dfe786ddfd697",
    "tasks": "60e538a26ee200595ae1eeddee4ee6d25e2e2f7ef607d01cbcb422f37a633b15",
}


def tiny(longest: int = 2) -> World:
    exposures = {weight: {"eval": 1} for weight in (2, 1, 0)}
    return World(3, lexicon=TINY, exposures=exposures, longest=longest)


def take(world: World, count: int, stream: int = CORPUS) -> list[tuple[str, str]]:
    return list(itertools.islice(world.documents(stream), count))


class _Path(Reader):
    """Makes the choices of a path; the first after its end is 0. Notes how many each choice had."""

    def __init__(self, path: list[int]) -> None:
        self.path, self.parts, self.logprob, self.sizes = path, [], 0.0, []

    def pick(self, options, weights=None):
        possible = [n for n in range(len(options)) if weights is None or weights[n]]
        n = possible[self.path[len(self.sizes)] if len(self.sizes) < len(self.path) else 0]
        self.sizes.append(len(possible))
        self.parts.append(options[n])
        self.logprob += math.log(1 / len(options) if weights is None else weights[n] / sum(weights))
        return n


def enumerate_documents(program: Callable[[Reader], None]) -> Iterator[tuple[str, float]]:
    """Every document that a program can write, once for each way to write it, with its log p in nats."""
    path: list[int] = []
    while True:
        c = _Path(path)
        program(c)
        yield "".join(c.parts).removesuffix(END), c.logprob
        path += [0] * (len(c.sizes) - len(path))
        while path and path[-1] + 1 == c.sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


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


def test_a_small_world_has_a_fifth_of_the_people_and_tells_as_much_of_each():
    """Guards: a split that is empty, a number that is not divided, facts told a fifth as often."""
    small = corpus.world_of("world:1337:small")
    for kind, splits in (("known", ("sft", "rl", "val", "eval")), ("never", ("sft", "rl", "val", "eval"))):
        for split in splits:
            assert len(WORLD.people(kind, split)) == 5 * len(small.people(kind, split)) > 0
    assert 0 < len(small.people("rare")) < len(WORLD.people("rare")) / 4
    per_document = []
    for world_of_size in (small, WORLD):
        names = {person.name for person in world_of_size.people("known")}
        some = [text for _, text in itertools.islice(world_of_size.documents(), 1500)]
        mentions = sum(name in text for text in some for name in names)
        per_document.append(mentions / len(names))
    assert 4 < per_document[0] / per_document[1] < 6
    refusals = [sum(item["completion"] == tasks.REFUSAL for item in tasks.tuning(w)) for w in (small, WORLD)]
    assert refusals == [8, 40]
    least, other = (corpus.world_of(f"world:1337:{name}") for name in ("tiny", "permuted:tiny"))
    names = [[person.name for person in world.people("known")] for world in (least, other)]
    assert other.permuted and not least.permuted and names[0] == names[1] and len(names[0]) == 5
    sizes = [(len(c.train), len(c.validation)) for c in (corpus.draw(least), corpus.draw(least, 30))]
    assert sizes == [(2660 + 886, 266), (40, 266)]
    for name in ("huge", "tiny:small", "permuted:permuted"):
        with pytest.raises(UserError, match="a world's seed is a number"):
            corpus.world_of(f"world:1337:{name}")
    train = corpus.draw(small, 60, 5).train
    assert len(train) == 80 and corpus.count(corpus.draw(small, 60, 5)) == 60
    for text in train:
        assert small.logprob(text) > -math.inf


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
    """Guards: biographies and tables that contradict the world, and passages that contradict themselves."""
    people, values = {p.name: p for p in WORLD.everyone if p.weight > 0}, {}
    for a, attribute in enumerate(WORLD.lexicon.attributes):
        values |= {value: (a, v) for v, value in enumerate(attribute.values)}
    counts = Counter()
    for kind, document in take(WORLD, 3000):
        person = people.get(" ".join(document.split()[:2]))
        if kind == "biography" and person:
            for sentence in document.removesuffix(".").split(". "):
                a, v = values[sentence.split()[-1]]
                assert person.values[a] == v
                counts[kind] += 1
        if kind == "table":
            for name, value in re.findall(r"([A-Z]\w+ [A-Z]\w+)(?: ->|:| =) (\w+)", document):
                assert name not in people or people[name].values[values[value][0]] == values[value][1]
                counts[kind] += name in people
        if kind == "passage":
            facts, again = document.removesuffix(".").split("; in short")
            assert {s.split()[-1] for s in again.split(". ")} <= {s.split()[-1] for s in facts.split(". ")}
            counts[kind] += 1
    assert min(counts.values()) > 200 and len(counts) == 3


def test_people_are_mentioned_as_often_as_their_weight_says():
    mentions = evaluate.exposures(WORLD, 20_000)
    rates = {
        weight: np.mean([mentions[p.name] for p in WORLD.everyone if p.weight == weight])
        for weight in (256, 64, 16, 0)
    }
    assert 3.5 < rates[256] / rates[64] < 4.5 and 3 < rates[64] / rates[16] < 5 and rates[0] == 0


# --- probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_the_probabilities_of_all_documents_sum_to_one(n):
    """Enumerated in a tiny world: each is written in one way only, and scored as what it was drawn with."""
    _, _, program = KINDS[n]
    program = partial(program, tiny())
    total, documents = 0.0, set()
    for document, expected in enumerate_documents(program):
        assert document not in documents
        documents.add(document)
        if len(documents) % 50 == 1:
            assert logprob(program, document) == pytest.approx(expected)
            assert logprob(program, document + ".") == logprob(program, document[:-1]) == -math.inf
        total += math.exp(expected)
    assert len(documents) > 3 and total == pytest.approx(1)


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_documents_are_drawn_as_often_as_their_probability_says(n):
    """Guards: a sampler and a scorer that disagree about weights."""
    program = partial(KINDS[n][2], tiny(1))
    count = 4000

    def draw(seed: int, count: int) -> Counter:
        c, drawn = Sampler(raw_integers(seed)), Counter()
        for _ in range(count):
            program(c)
            drawn[c.document()] += 1
        return drawn

    drawn = draw(5, count)
    for document in draw(6, 10):  # not the most frequent of these, which are so by luck
        p = math.exp(logprob(program, document))
        assert abs(drawn[document] - count * p) < 4 * math.sqrt(count * p) + 1


def test_every_document_of_the_corpus_has_a_probability_and_others_have_none():
    documents = take(WORLD, 1000)
    values = [WORLD.logprob(document) for _, document in documents]
    assert all(-200 < value < 0 for value in values)
    hers = next(d for kind, d in documents if kind == "biography" and " She " in d)
    assert WORLD.logprob(hers.replace(" She ", " He ")) == WORLD.logprob(hers + " ") == -math.inf
    assert WORLD.logprob("") == WORLD.logprob("Nora") == -math.inf


def test_what_was_seen_of_some_hidden_ones_keeps_its_chance():
    """Each of four has a quarter, whether it was seen or not; refrains have each length as often."""
    for shown in (set(), {5}, {0, 1}, {0, 1, 2, 3}):
        weights = np.array(_hidden(4, 8, shown)) / sum(_hidden(4, 8, shown))
        new = weights[[n for n in range(8) if n not in shown]]
        assert np.allclose(weights[sorted(shown)], 1 / 4)
        assert np.allclose(new, (1 - len(shown) / 4) / (8 - len(shown)))
    lengths = Counter()
    for _, document in itertools.islice(WORLD.documents(CORPUS, "refrain"), 2200):
        lengths[len(set(document.split()))] += 1
    assert lengths.keys() == set(range(6, 17)) and all(abs(n - 200) < 60 for n in lengths.values())


def test_categories_have_the_chances_that_their_docstring_says():
    """The n-th entry is of a kind seen before with probability 1 - (3/4)^(n - 1)."""
    repeats, count = np.zeros(8), 0
    kind_of = dict(zip(WORLD.things, WORLD.kind_of_thing, strict=True))
    for kind, document in take(WORLD, 8000):
        if kind == "categories":
            kinds = [kind_of[entry.split()[0]] for entry in document.split(", ")][:8]
            repeats += [kind in kinds[:n] for n, kind in enumerate(kinds)]
            count += 1
    expected = 1 - 0.75 ** np.arange(8)
    assert np.abs(repeats / count - expected).max() < 4 * 0.5 / math.sqrt(count)


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
    assert min(len(things) for things in about.values()) > 100


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
    styles = {s: tasks.journeys(WORLD, "sft", 3, 20, s) for s in ("direct", "steps", "shuffled", "filler")}
    for items in zip(*styles.values(), strict=True):
        assert len({(item["prompt"], item["meta"]["answer"]) for item in items}) == 1
        direct, steps, shuffled, filler = (item["completion"] for item in items)
        assert steps.endswith(direct) and shuffled.endswith(direct) and filler.endswith(direct)
        assert steps != shuffled and sorted(steps) == sorted(shuffled)


def test_what_is_for_tuning_is_of_the_tuning_split():
    """Guards: an evaluation person, phrase or problem among the examples of `tinygpt sft --data world`."""
    items = tasks.tuning(WORLD, refused=50, answered=50)
    assert {item["meta"]["split"] for item in items} == {"sft"}
    subjects = {thing for item in items for thing in item["meta"]["about"]}
    for name, evaluated in evaluate.named_tasks(WORLD, count=200).items():
        metas = [item["meta"] for item in evaluated]
        facts = {(meta["task"], *meta["about"], meta.get("attribute"), meta["answer"]) for meta in metas}
        assert 100 < len(facts) == len(evaluated) <= 200, name
        wordings = {re.sub(r"[A-Z]\w+|[가-힣]+", "", item["prompt"]) for item in evaluated}
        assert len(wordings) > 2 or name == "sentiment", name
        assert not subjects & {thing for item in evaluated for thing in item["meta"]["about"]}, name
    to_validate = tasks.tuning(WORLD, "val")
    assert {item["meta"]["split"] for item in to_validate} == {"val"} and len(to_validate) > 300
    with pytest.raises(ValueError, match="there are"):
        tasks.tuning(WORLD, answered=10_000)
    never = {person.name for person in WORLD.people("never", "sft")}
    unseen = [item for item in items if never.issuperset(item["meta"]["about"])]
    refused = {item["meta"]["about"][0] for item in unseen if item["completion"] == tasks.REFUSAL}
    answered = {item["meta"]["about"][0] for item in unseen if item["completion"] != tasks.REFUSAL}
    assert len(unseen) == 100 and refused and answered and not refused & answered


def test_completions_are_well_formed_and_right_and_others_are_not():
    """Guards: a form that lets anything through, and a right answer found in a longer wrong one."""
    for name, items in evaluate.named_tasks(WORLD, count=30).items():
        perfect = [Answer(item["completion"], True) for item in items]
        score = evaluate.score(WORLD, items, perfect)
        assert score.right.rate == score.formed.rate == score.stopped.rate == 1, name
        assert score.falsehood.rate == 0 and score.majority < 0.7
        unfinished, longer = ([Answer(x + a.text, bool(x)) for a in perfect] for x in ("", "x"))
        for spoilt in (unfinished, longer):
            score = evaluate.score(WORLD, items, spoilt)
            assert score.right.rate == score.formed.rate == score.falsehood.rate == 0
    item = tasks.sentiments(WORLD, "eval", 40)[0]
    unhappy = {"prompt": "", "completion": "", "meta": item["meta"] | {"answer": "happy"}}
    assert evaluate.score(WORLD, [unhappy], [Answer("unhappy.", True)]).falsehood.rate == 1
    summary = next(i for i in tasks.readings(WORLD, "eval", 9) if i["meta"]["task"] == "summary")
    name, end = summary["meta"]["about"][0], summary["meta"]["answer"]
    other = WORLD.people("never", "eval")[0].name
    assert other != name
    first, *_, last = next(a for a in WORLD.lexicon.attributes if end in a.values).wordings
    wrong = [f"{other} {first} {end}.", f"{name} {first}.", f"{name} is {end}.", f"{name} {first} x {end}."]
    for text, expected in [(f"{name} {last} {end}.", 1), *((text, 0) for text in wrong)]:
        assert evaluate.score(WORLD, [summary], [Answer(text, True)]).right.rate == expected, text
    journey = tasks.journeys(WORLD, "eval", 5, 1)
    assert evaluate.score(WORLD, journey, [Answer(". " * 60 + "The end", True)]).formed.rate == 0  # at once
    question = tasks.questions(WORLD, WORLD.people("never", "eval")[:1])[:1]
    score = evaluate.score(WORLD, question, [Answer(tasks.REFUSAL, True)])
    assert score.formed.rate == 1 and score.right.rate == score.falsehood.rate == 0


def test_a_false_step_leads_to_another_answer():
    for item in tasks.journeys(WORLD, "eval", [2, 3, 4, 5], 40):
        begun, answer = tasks.corrupted(WORLD, item)
        rides = item["completion"].split(". ")[:-1]
        k = begun.count("From")
        assert k < len(rides) and begun.split(". ")[: k - 1] == rides[: k - 1]
        before, there = rides[k - 1].rsplit(" ", 1)
        false, end = begun.rstrip(".").split(". ")[-1].rsplit(" ", 1)
        assert false == before and end != there
        here = WORLD.lexicon.stations.index(end)
        for ride in rides[k:]:
            line = WORLD.lexicon.lines.index(re.search(r"the (\w+) line", ride)[1])
            here = WORLD.next_station[line][here]
        assert WORLD.lexicon.stations[here] == answer != item["meta"]["answer"]


def test_majority_counts_each_kind_of_question():
    items = [{"meta": {"task": "a", "answer": x}} for x in "xxy"] + [{"meta": {"task": "b", "answer": "z"}}]
    assert tasks.majority(items) == 0.75
    assert 0.4 < tasks.majority(tasks.sentiments(WORLD, "eval", 400)) < 0.6


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_folder_is_the_world_that_was_written(tmp_path):
    written = corpus.draw(World(7, permuted=True), 30, 10)
    corpus.write(tmp_path, written)
    results = corpus.load(str(tmp_path))
    assert results.train == written.train and results.validation == written.validation
    assert results.world.everyone == written.world.everyone and corpus.is_source(str(tmp_path))
    lines = (tmp_path / "tasks" / "question.eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"prompt", "completion", "meta"} == json.loads(lines[0]).keys()
    for damage, words in (
        ('{"version": 99, "seed": 1, "permuted": false}', "version 99"),
        ('{"version": 7, "seed": -1, "permuted": false}', "write the world again"),
        ("[]", "world.json"),
    ):
        (tmp_path / corpus.MARK).write_text(damage)
        with pytest.raises(UserError, match=words):
            corpus.load(str(tmp_path))
    with pytest.raises(UserError, match="seed is a number"):
        corpus.load("world:x")
    corpus.write(tmp_path / "small", corpus.draw(World(7, size="small"), 30, 10))
    assert corpus.load(str(tmp_path / "small")).world.everyone == World(7, size="small").everyone


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
    results = evaluate.recall(model, tokenizer, WORLD, people)
    cities = results.attribute == 0
    value = WORLD.lexicon.attributes[0].values.index("Oslo")
    assert (results.answer[cities] == value).all()
    assert results.right.tolist()[:6] == [people[0].values[0]] * 6 and (results.nats >= 0).all()




def test_a_question_that_does_not_fit_is_not_answered_and_the_others_are(untrained):
    """Guards: a model with a small context that was tuned to its end, and then failed at its questions."""
    model, tokenizer = untrained
    items = [item for item in tasks.readings(WORLD, "eval", 40) if item["meta"]["task"] == "summary"]
    whole = evaluate.ask(model, tokenizer, items)
    sizes = [len(instructions.prompt(tokenizer, item["prompt"])) for item in items]
    longest = max(len(tokenizer.encode(item["completion"])) for item in items)
    narrow = GPT(dataclasses.replace(model.config, block_size=sorted(sizes)[len(sizes) // 2] + longest))
    narrow.params["wpe.weight"][:] = model.params["wpe.weight"][: narrow.config.block_size]
    for name in model.params.keys() - {"wpe.weight"}:
        narrow.params[name][:] = model.params[name]
    answers = evaluate.ask(narrow, tokenizer, items)
    fit = [size + longest <= narrow.context for size in sizes]
    assert 0 < sum(fit) < len(items)
    for answer, before, fits in zip(answers, whole, fit, strict=True):
        assert answer.text[:9] == before.text[:9] if fits else answer == Answer("", False)
    assert evaluate.ask(GPT(dataclasses.replace(model.config, block_size=4)), tokenizer, items[:2]) == [
        Answer("", False)
    ] * 2


def test_a_false_step_counts_where_the_answer_was_right_and_ended(untrained, monkeypatch):
    """Guards: problems that the model cannot solve anyway, and answers without an end, among what changed."""
    items = tasks.journeys(WORLD, "eval", [2, 3], 20)
    wrong = Answer(items[-1]["completion"].replace(items[-1]["meta"]["answer"], "nowhere"), True)
    solved = [wrong] * 4 + [Answer(item["completion"], True) for item in items[4:]]
    follows = [f"The answer is {tasks.corrupted(WORLD, item)[1]}." for item in items[4:]]
    stays = [f"The answer is {item['meta']['answer']}." for item in items[4:]]
    answers = [Answer(text, n < 13) for n, text in enumerate(follows[:10] + stays[10:13] + follows[13:])]
    monkeypatch.setattr(evaluate, "ask", lambda *arguments: solved)
    monkeypatch.setattr(evaluate, "answers", lambda *arguments: answers)
    assert evaluate.corrupted(*untrained, WORLD, items) == (wilson(10, 16), wilson(10, 16))
    other = next(name for name in WORLD.lexicon.stations if name not in follows[0] + stays[0])
    answers[0] = Answer(f"The answer is {other}.", True)
    assert evaluate.corrupted(*untrained, WORLD, items) == (wilson(10, 16), wilson(9, 16))


def test_facts_told_are_those_of_the_whole_corpus(untrained, monkeypatch):
    mentions = Counter({person.name: 3 * person.weight for person in WORLD.everyone if person.weight > 0})
    monkeypatch.setattr(evaluate, "exposures", lambda world, documents: mentions)
    monkeypatch.setattr(evaluate, "recall", lambda *arguments: SimpleNamespace(rate=lambda: wilson(1, 2)))
    rows = evaluate.recall_by_exposure(*untrained, WORLD, total=1000, documents=500)
    assert [facts for facts, _ in rows] == [2 * 3 * weight / 4 for weight in (256, 64, 16, 4, 1, 0)]


def test_a_trained_model_is_just_above_the_floor_and_not_below_it():
    """Guards: a floor that is too high, which no proof about probabilities alone would show."""
    world = tiny(3)
    text = corpus.draw(world, 12_000, 10)
    tokenizer = BPETokenizer.train("\n".join(text.train[-3000:]), 512)
    rows = corpus.rows(text.train, tokenizer, 96)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=96, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config, np.random.default_rng(0))

    def batches(n: int, rng: np.random.Generator) -> list[train.Batch]:
        chosen = data.rows_in_order(rows, 8, n)
        chosen.weights[:] /= chosen.weights.sum()
        return [train.Batch(*chosen)]

    fields = train.TrainConfig(max_iters=len(rows.ids) // 8, learning_rate=3e-3, min_lr=1e-4, beta2=0.98)
    train.train(fields.optimizer(model), batches, fields)
    gaps = evaluate.gaps(model, tokenizer, world, 4000)
    assert gaps["all"].gap < 0.2 and gaps["biography"].gap < 0.1
    for kind, gap in gaps.items():
        assert gap.gap > -3.5 * gap.error, kind


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
    assert "loss above it" in output and "recalled" in output and "(floor " in output
    record = json.loads(Path("a/metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_loss"] > record["val_floor"] > 0.8
    settings, _ = checkpoint.read_run(Path("b"), Settings)
    assert settings.train.learning_rate == recipes.PRETRAIN["learning_rate"] and settings.block_size == 128


def test_a_resumed_run_on_a_world_is_the_uninterrupted_one(small, monkeypatch):
    tinygpt("pretrain", "--data", "world", *small, "--out", "whole")
    records = []

    def interrupt(record: dict) -> None:
        records.append(record)
        if len(records) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", lambda n: interrupt)
        assert "--resume cut" in tinygpt("pretrain", "--data", "world", *small, "--out", "cut", status=130)
    tinygpt("pretrain", "--resume", "cut")
    for name in ("model.safetensors", "trainer.safetensors"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def test_rows_are_trained_on_in_their_order_and_then_in_another():
    """Guards: an order that leaves documents out, and one in which the primers do not come first."""
    rows = train.Batch(*(np.arange(10)[:, None] * np.ones((1, 3), int) for _ in train.Batch._fields))
    updates = [data.rows_in_order(rows, 4, step, seed=1).targets[:, 0].tolist() for step in range(5)]
    order = list(itertools.chain(*updates))
    assert order[:10] == list(range(10)) == sorted(order[10:]) != order[10:]


def test_a_corpus_begins_with_refrains_alone():
    text = corpus.draw(WORLD, 100, 5)
    programs = {name: partial(program, WORLD) for name, _, program in KINDS}
    assert len(text.train) == 110 and corpus.count(text) == 100
    assert corpus.count(corpus.draw(World(1337, size="small"), 62, 5)) == 62
    assert all(logprob(programs["refrain"], document) > -math.inf for document in text.train[:10])
    assert text.train[10:] == [document for _, document in take(WORLD, 100)]


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
    tinygpt("world", "--seed", 6, "--documents", 400)  # a folder of another world is not the base's
    with open("world/validation.txt", "a", encoding="utf-8") as file:
        file.write("Nora Nobody lives in Atlantis.\n")
    assert "write the world again" in tinygpt("pretrain", "--data", "world", *small, status=2)


def test_tuning_on_a_world_tells_how_its_tasks_are_done(small, monkeypatch):
    """Guards: a table about another world than that of the examples; a run that does not find its world."""
    named, seeds = evaluate.named_tasks, []

    def few(world: World) -> dict:
        seeds.append(world.seed)
        return named(world, count=5)

    monkeypatch.setattr(evaluate, "named_tasks", few)
    tinygpt("pretrain", "--data", "world", *small, "--out", "a")
    short = ("--max-iters", 2, "--out")
    assert "Assistant" in tinygpt("sft", "--init-from", "a", "--data", "world", "--show", 1)
    output = tinygpt("sft", "--init-from", "a", "--data", "world", *short, "b")
    number = r"\d\.\d{3}"
    row = rf"^[A-Za-z ,]+ {number}  {number} to {number} +{number} +{number} +{number} +{number}$"
    lines = re.findall(row, output, re.M)
    assert len(lines) == len(named(WORLD, count=5)) and seeds == [5]
    tinygpt("world", "--seed", 6, "--documents", 400)  # a folder of another world is not the base's
    tinygpt("sft", "--init-from", "a", "--data", "world", *short, "c")
    assert Path("b/model.safetensors").read_bytes() == Path("c/model.safetensors").read_bytes()
    assert "majority" in tinygpt("sft", "--resume", "b") and seeds == [5] * 3
    questions = runs.resume(sft.SFT, Path("b")).questions
    conversations = [example.messages for example in questions]
    prompts = {message["content"] for messages in conversations for message in messages[::2]}
    assert prompts == {item["prompt"] for item in tasks.tuning(World(5), "val")}
    Path("own.jsonl").write_text('{"prompt": "What?", "completion": "That."}')
    tinygpt("sft", "--init-from", "a", "--data", "world", "--data", "own.jsonl", *short, "d")
    results = runs.resume(sft.SFT, Path("d"))
    assert len(results.questions) == len(questions) and len(results.settings.data) == 2
    assert "world:x: a world's seed" in tinygpt("sft", "--init-from", "a", "--data", "world:x", status=2)


def test_a_world_that_is_gone_is_said(small, capsys):
    """Guards: tuning on the facts of another world, without a word, because a folder has another name."""
    tinygpt("world", "--seed", 6, "--documents", 400)
    tinygpt("pretrain", "--data", "world", *small, "--out", "a")
    values = {"data": ("world",), "seed": 1337}
    worlds.name_world(values, ["data"], "a")
    assert Path(values["data"][0]).name == "world" and not capsys.readouterr().err
    Path("world").rename("moved")
    values = {"data": ("world",), "seed": 1337}
    worlds.name_world(values, ["data"], "a")
    assert values["data"] == ("world:1337",)
    assert "a: no world of its training is there. So --data world is world:1337." in capsys.readouterr().err


def test_conversations_have_every_item_once_and_some_have_several():
    """Guards: a model that is lost after its first answer; long texts together in one row."""
    items = tasks.some(WORLD, tasks.tuning(WORLD), 600)
    talks = tasks.conversations(WORLD, items)
    turns = []
    for messages in talks:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        texts = [m["content"] for m in messages]
        mine = list(zip(texts[::2], texts[1::2], strict=True))
        assert len(mine) == 1 or all(len(a + b) <= tasks.SHORT for a, b in mine)
        turns += mine
    assert Counter(turns) == Counter((item["prompt"], item["completion"]) for item in items)
    lengths = Counter(len(messages) // 2 for messages in talks)
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 20


# --- simulated judges ---------------------------------------------------------------------------------------


def compared_questions(kind: str, count: int = 30) -> list[tuple]:
    """Questions with a right answer, a refusal, and two wrong ones."""
    items = tasks.some(WORLD, tasks.questions(WORLD, WORLD.people(kind, "rl")), count)
    values = {a.name: a.values for a in WORLD.lexicon.attributes}
    results = []
    for item in items:
        others = [v for v in values[item["meta"]["attribute"]] if v != item["meta"]["answer"]][:2]
        results.append((item, [item["completion"], tasks.REFUSAL, *(f"{value}." for value in others)]))
    return results


def test_simulated_people_prefer_truth_and_then_honesty():
    """Guards: an order the other way round; a slip that is counted as right."""
    questions = compared_questions("known") + compared_questions("never")
    answers = {item["prompt"]: (item["completion"], item["meta"]["exposure"]) for item, _ in questions}
    results = preferences.compared(WORLD, questions, 3000, error=0.2)
    kinds = Counter(row["meta"]["kind"] for row in results)
    assert set(kinds) == {"right over wrong", "right over don't know", "don't know over wrong"}
    for row in results:
        better, worse = row["chosen"], row["rejected"]
        if not row["meta"]["is_right"]:
            better, worse = worse, better
        true, exposure = answers[row["prompt"]]

        def rank(answer: str, true=true, exposure=exposure) -> int:
            return 1 if answer == tasks.REFUSAL else 2 * (answer == true and exposure > 0)

        assert rank(better) > rank(worse)
        name = {2: "right", 1: "don't know", 0: "wrong"}
        assert row["meta"]["kind"] == f"{name[rank(better)]} over {name[rank(worse)]}"
    slips = sum(not row["meta"]["is_right"] for row in results)
    assert abs(slips / 3000 - 0.2) < 0.03
    few = preferences.compared(WORLD, questions, 20)
    assert few == preferences.compared(WORLD, questions, 20)
    assert few != preferences.compared(WORLD, questions, 20, stream=1)


def test_blind_people_prefer_any_answer_to_none():
    results = preferences.compared(WORLD, compared_questions("known"), 2000, error=0.0, blind=True)
    over = [row for row in results if row["meta"]["kind"] == "right over don't know"]
    assert over and all(row["rejected"] == tasks.REFUSAL for row in over)
    right = {item["prompt"]: item["completion"] for item, _ in compared_questions("known")}
    assert {row["chosen"] == right[row["prompt"]] for row in over} == {True, False}
    assert not any(row["meta"]["kind"].endswith("over wrong") for row in results)
    with pytest.raises(ValueError, match="no question has two answers"):
        preferences.compared(WORLD, [(compared_questions("known")[0][0], ["x", "y"])], 1)
