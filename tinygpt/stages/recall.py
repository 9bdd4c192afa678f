"""The two memories, side by side: what the weights hold, and what the prompt says.

    Nora Hill lives in Lima. Nora Hill works as a baker. Nora Hill moved to

Weights that were trained on "Nora Hill lives in Oslo" say Oslo (parametric memory), the prompt says Lima
(non-parametric memory), and the model one of the two. What is read from a prompt is read by attention heads:
by those that look back to what followed the same token before (induction heads, Olsson et al. 2022,
"In-context Learning and Induction Heads"), which can be found and knocked out.
"""

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from ..core import ops
from ..core.model import GPT
from ..text.data import Array, Tokenizer
from ..text.stream import encode_prompt
from ..world import TASKS, Person, World, raw_integers, shuffled
from ..world.chance import pick
from .answers import Rate, likelihoods, wilson

Head = tuple[int, int]  # layer, head

# --- facts in the prompt ------------------------------------------------------------------------------------


class Memories(NamedTuple):
    """Which of the two memories answers."""

    prompt: Rate  # how often the likeliest value is that of the prompt
    weights: Rate  # how often it is the person's own, which pre-training told, or not
    nats: float  # log p(prompt's value) - log p(own value), in the mean; 0 where they are one


def memories(
    model: GPT, tokenizer: Tokenizer, world: World, people: Sequence[Person], repeats: int = 1,
    own: bool = False, rival: bool = False,
) -> Memories:  # fmt: skip
    """For each attribute of these people: does the prompt answer, or do the weights?

    The prompt says `repeats` times that somebody has another value of it, or with `own` theirs, among two
    other facts, and goes on as if to say it once more, in a wording that it has not used. rival: somewhere
    before, somebody else has yet another value of it; then to copy a value of the right kind is not enough.
    """
    attributes = world.lexicon.attributes
    values = [[tokenizer.encode(f" {value}") for value in a.values] for a in attributes]
    prompts, options, pairs = [], [], []
    for n, person in enumerate(people):
        for a, attribute in enumerate(attributes):
            integers, size = raw_integers(world.seed, TASKS, 22, n, a), len(attribute.values)
            value = person.values[a]
            target = value if own else (value + 1 + next(integers) % (size - 1)) % size
            *wordings, last = shuffled(attribute.wordings, integers)
            facts = [f"{wordings[r % len(wordings)]} {attribute.values[target]}" for r in range(repeats)]
            for b in shuffled([b for b in range(len(attributes)) if b != a], integers)[:2]:
                fact = f"{attributes[b].wordings[0]} {pick(attributes[b].values, integers)}"
                facts.insert(next(integers) % (len(facts) + 1), fact)
            sentences = [f"{person.name} {fact}" for fact in [*facts, last]]
            if rival:
                third = pick([v for v in attribute.values if v != attribute.values[target]], integers)
                other = f"{people[(n + 1) % len(people)].name} {pick(attribute.wordings, integers)} {third}"
                sentences.insert(next(integers) % len(sentences), other)
            prompts.append(encode_prompt(tokenizer, ". ".join(sentences)))
            options.append(values[a])
            pairs.append((target, value))
    logp = likelihoods(model, prompts, options)
    nats = [row[target] - row[value] for row, (target, value) in zip(logp, pairs, strict=True)]
    target, value = np.array(pairs).T
    chosen = np.array([row.argmax() for row in logp])
    rates = (wilson(int((chosen == answer).sum()), len(pairs)) for answer in (target, value))
    return Memories(*rates, float(np.mean(nats)))


# --- heads --------------------------------------------------------------------------------------------------


def attention(model: GPT, ids: Array) -> Array:
    """Who looks where: probabilities (n_layer, B, H, T, T) of queries (rows) over keys, for ids (B, T)."""
    maps = []

    def watched(*given, **how) -> tuple:
        out, cache = ops.attention_forward(*given, **how)
        maps.append(cache[3])
        return out, cache

    watching = copy.copy(model)
    watching.ops = SimpleNamespace(**vars(ops) | {"attention_forward": watched})
    watching.forward(ids)
    return np.stack(maps)


def induction_scores(model: GPT, tokens: Sequence[int], count: int = 50) -> Array:
    """For each head, (n_layer, H): how much of its attention goes to what followed the same token before.

    A head that looks everywhere alike has 1 / 25 or less.
    """
    return _looking_back(model, tokens, count, LENGTH - 1)


def previous_scores(model: GPT, tokens: Sequence[int], count: int = 50) -> Array:
    """For each head, (n_layer, H): how much of its attention goes to the token before. What induction heads
    look for, a token's predecessor, such a head of an earlier layer has written beside that token."""
    return _looking_back(model, tokens, count, 1)


LENGTH = 25  # of random tokens


def _looking_back(model: GPT, tokens: Sequence[int], count: int, places: int) -> Array:
    """The mean attention to so many places before, in the second half of `count` texts of random tokens said
    twice, of which nothing but the first half tells what comes."""
    rng = np.random.default_rng(0)
    once = np.stack([rng.choice(tokens, LENGTH, replace=False) for _ in range(count)])
    maps = attention(model, np.concatenate([once, once], 1).astype(np.int32))
    query = np.arange(LENGTH, 2 * LENGTH - 1)
    return maps[..., query, query - places].mean(axis=(1, 3))


def strongest(scores: Array) -> list[Head]:
    """The heads that have more than half of the best score (n_layer, H)."""
    return [(int(layer), int(head)) for layer, head in np.argwhere(scores > scores.max() / 2)]


def without(model: GPT, heads: Iterable[Head]) -> GPT:
    """A copy of a model in which these heads add nothing to the stream."""
    ablation, size = model.copy(), model.config.n_embd // model.config.n_head
    for layer, head in heads:
        ablation.params[f"h.{layer}.attn.c_proj.weight"][head * size : (head + 1) * size] = 0
    return ablation


def others(
    shape: tuple[int, int], heads: Sequence[Head], sets: int, spared: Sequence[Head] = ()
) -> list[list[Head]]:
    """`sets` random choices of as many heads that are none of these nor spared, or of all such where there
    are fewer. shape: n_layer, n_head."""
    rest = [head for head in np.ndindex(shape) if head not in {*heads, *spared}]
    rng = np.random.default_rng(0)
    return [[rest[i] for i in rng.permutation(len(rest))[: len(heads)]] for _ in range(sets)]
