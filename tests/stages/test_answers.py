"""Answers in batches, and rates with intervals."""

import doctest
import math

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.generate import generate
from tinygpt.core.model import GPT
from tinygpt.stages import answers as evaluate
from tinygpt.stages.answers import Answer
from tinygpt.text import instructions
from tinygpt.text.stream import encode_prompt
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
    found = evaluate.answers(model, tokenizer, prompts, 8)
    assert len(set(found)) > 10
    for prompt, answer in list(zip(prompts, found, strict=True))[::7]:
        ids = instructions.prompt(tokenizer, prompt) if tuned else encode_prompt(tokenizer, prompt)
        stop = (tokenizer.eos_id,)
        (new,) = generate(model, [ids], 8, temperature=0, stop=stop, vocab_size=tokenizer.vocab_size)
        stopped = new[-1] == tokenizer.eos_id
        assert answer == (tokenizer.decode(new[:-1] if stopped else new).strip(), stopped)
        assert evaluate.answers(model, tokenizer, [ids], 8) == [answer]
    assert evaluate.answers(model, tokenizer, [], 8) == []
    talk = [{"role": "user", "content": "the cat"}]
    (asked,) = evaluate.answers(model, tokenizer, [talk], 8)
    assert [asked] == evaluate.answers(model, tokenizer, [instructions.prompt(tokenizer, talk)], 8)


def test_an_answer_that_is_cut_short_is_told_apart(made):
    """Guards: the end token in the text, or an answer at the limit that counts as one that stopped."""
    model, tokenizer = made
    model.params["ln_f.weight"][:] = 0
    model.params["ln_f.bias"][:] = model.params["wte.weight"][tokenizer.eos_id] * 50
    assert evaluate.answers(model, tokenizer, ["a"], 5) == [Answer("", True)]
    model.params["ln_f.bias"][:] = model.params["wte.weight"][tokenizer.encode("t")[0]] * 50
    assert evaluate.answers(model, tokenizer, ["a"], 5) == [Answer("ttttt", False)]


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
    found = evaluate.likelihoods(model, prompts, choices, rows=2)
    for prompt, options, logp in zip(prompts, choices, found, strict=True):
        assert logp.shape == (len(options),)
        for option, mine in zip(options, logp, strict=True):
            ids = np.concatenate([prompt, option])[None]
            nll = model.loss(ids[:, :-1], ids[:, 1:], np.arange(ids.size - 1)[None] >= len(prompt) - 1.0)
            assert mine == pytest.approx(-nll, rel=1e-9)
