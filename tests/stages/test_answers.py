"""Answers in batches, and rates with intervals."""

import doctest
import math

import numpy as np
import pytest

from tinygpt.core import kernels
from tinygpt.core.config import GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.model import GPT
from tinygpt.stages import answers as evaluate
from tinygpt.stages.answers import Answer
from tinygpt.stages.samples import sample
from tinygpt.stages.variants import build
from tinygpt.text import instructions
from tinygpt.text.stream import encode_prompt, stream
from tinygpt.text.tokenizer import BPETokenizer


def test_doctests():
    outcome = doctest.testmod(evaluate)
    assert outcome.attempted and not outcome.failed


@pytest.fixture
def made():
    tokenizer = BPETokenizer.train("User: Assistant: the cat sat on the mat " * 3, 290)
    config = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config, np.random.default_rng(0), np.float64)
    model.flat *= 8  # or every token is as likely as any other
    return model, tokenizer


@pytest.mark.parametrize("tuned", [False, True])
def test_a_batch_answers_as_one_by_one(made, tuned):
    """Guards: answers in another order than their questions; neighbours and padding that change an answer; a
    prompt in the form of another kind of model."""
    model, tokenizer = made
    tokenizer.chat_template = instructions.TEMPLATE if tuned else None
    prompts = ["the cat " * (n % 7) + "sat " * (n % 3) + "t" * (n % 11) for n in range(evaluate.BATCH + 9)]
    results = evaluate.answers(model, tokenizer, prompts, 8)
    assert len(set(results)) > 10
    for prompt, answer in list(zip(prompts, results, strict=True))[::7]:
        ids = instructions.prompt(tokenizer, prompt) if tuned else encode_prompt(tokenizer, prompt)
        stop = (tokenizer.eos_id,)
        (new,) = generate(model, [ids], 8, temperature=0, stop=stop, vocab_size=tokenizer.vocab_size)
        stopped = new[-1] == tokenizer.eos_id
        assert answer == (tokenizer.decode(new[:-1] if stopped else new).strip(), stopped)
        assert evaluate.answers(model, tokenizer, [ids], 8) == [answer]
    assert evaluate.answers(model, tokenizer, [], 8) == []
    talk = [{"role": "user", "content": "the cat"}]
    (queries,) = evaluate.answers(model, tokenizer, [talk], 8)
    assert [queries] == evaluate.answers(model, tokenizer, [instructions.prompt(tokenizer, talk)], 8)


def test_an_answer_that_is_cut_short_is_told_apart(made):
    """Guards: the end token in the text, or an answer at the limit that counts as one that stopped."""
    model, tokenizer = made
    model.params["ln_f.weight"][:] = 0
    model.params["ln_f.bias"][:] = model.params["wte.weight"][tokenizer.eos_id] * 50
    assert evaluate.answers(model, tokenizer, ["a"], 5) == [Answer("", True)]
    model.params["ln_f.bias"][:] = model.params["wte.weight"][tokenizer.encode("t")[0]] * 50
    assert evaluate.answers(model, tokenizer, ["a"], 5) == [Answer("ttttt", False)]


def test_every_id_that_ends_a_text_ends_an_answer(made):
    """Guards: answers and samples that go past an end token of another tool's model, where chat stops.

    A special token that stops is no part of the text, an ordinary one is.
    """
    model, tokenizer = made
    model.params["ln_f.weight"][:] = 0
    for word, special in ((" mat", False), ("<|im_end|>", True)):
        i = tokenizer.encode(" mat")[0]
        tokenizer.stops, tokenizer.special = {tokenizer.eos_id, i}, {"<|endoftext|>": tokenizer.eos_id}
        tokenizer.special |= {word: i} if special else {}
        model.params["ln_f.bias"][:] = model.params["wte.weight"][i] * 50
        text, prompt = "" if special else tokenizer.decode([i]).strip(), tokenizer.encode("the")
        assert evaluate.answers(model, tokenizer, ["the"], 5) == [Answer(text, True)]
        drawn = sample(model, tokenizer, [prompt], 2, 5, np.random.default_rng(0))
        assert drawn.stopped.all() and drawn.mask.sum() == 2 and {a.strip() for a in drawn.answers} == {text}
        assert "".join(stream(model, tokenizer, prompt, 5, temperature=0)).strip() == text


@pytest.mark.skipif("c" not in kernels.available(), reason="needs the C core")
def test_answers_pack_each_weight_once(made, monkeypatch):
    """Guards: copies of all weights that are made again for each 64 prompts."""
    model, tokenizer = made
    model = build(model.config, np.random.default_rng(0), ops=kernels)
    copies, pack_panels = [], kernels.pack_panels
    monkeypatch.setattr(kernels, "pack_panels", lambda *a: copies.append(a) or pack_panels(*a))
    prompts = [np.array([1, 2, n % 50]) for n in range(3 * evaluate.BATCH)]
    tokenizer.stops = set()
    evaluate.answers(model, tokenizer, prompts, 16)
    assert len(copies) == 4 * model.config.n_layer + 1


def test_rates():
    """Guards: an interval that is a point at 0 and 1, or leaves them. The figures are Wilson's formula's."""
    assert evaluate.wilson(81, 263)[1:3] == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, I
    assert evaluate.wilson(0, 10) == pytest.approx((0.0, 0.0, 0.277533, 10), abs=1e-4)
    assert evaluate.wilson(10, 10) == pytest.approx((1.0, 0.722467, 1.0, 10), abs=1e-4)
    assert evaluate.wilson(80, 100) == pytest.approx((0.8, 0.711171, 0.866633, 100), abs=1e-4)
    assert math.isnan(evaluate.wilson(0, 0).rate) and evaluate.wilson(0, 0)[1:] == (0, 1, 0)


def test_likelihoods_are_those_of_each_text_alone(made):
    """Guards: a choice's last token scored where its first is; one prompt's logits taken for another's."""
    model, tokenizer = made
    prompts = [tokenizer.encode("the cat " * n + "sat") for n in range(1, 6)]
    words = [" on", " on the mat", " on the", " mat", " qq"]
    choices = [[tokenizer.encode(word) for word in words[: n + 1]] for n in range(5)]
    assert len({len(ids) for ids in choices[-1]}) > 2
    results = evaluate.likelihoods(model, prompts, choices, rows=2)
    for prompt, options, logp in zip(prompts, choices, results, strict=True):
        assert logp.shape == (len(options),)
        for option, mine in zip(options, logp, strict=True):
            ids = np.concatenate([prompt, option])[None]
            nll = model.loss(ids[:, :-1], ids[:, 1:], np.arange(ids.size - 1)[None] >= len(prompt) - 1.0)
            assert mine == pytest.approx(-nll, rel=1e-9)
