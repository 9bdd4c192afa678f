"""Two memories: the facts in the weights, and the facts in the prompt.

    Nora Hill lives in Lima. Nora Hill works as a baker. Nora Hill moved to

In the world "lives in" and "moved to" mean the same. A model was trained on "Nora Hill lives in Oslo": its
weights store Oslo (parametric memory). The prompt has Lima (non-parametric memory). Which of the two does
the model say? Attention heads read the prompt. Some of them are induction heads (Olsson et al. 2022,
"In-context Learning and Induction Heads"): each attends to the token that followed an earlier occurrence of
the present token. `induction_scores` and `strongest` find these heads, and `without` removes them.
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
    weights: Rate  # how often it is the person's own value
    nats: float  # log p(prompt's value) - log p(own value), in the mean; 0 where they are equal


def memories(
    model: GPT, tokenizer: Tokenizer, world: World, people: Sequence[Person], repeats: int = 1,
    agrees: bool = False, rival: bool = False,
) -> Memories:  # fmt: skip
    """How often the model says the prompt's value of an attribute, and how often the person's own value.

    The prompt gives the person a false value, `repeats` times; with `agrees` it gives the person's own value.
    Among these sentences the person gets random values of two other attributes. The last sentence stops
    before the value. The person's other sentences have other wordings.

    rival: an earlier sentence gives another person another value of the same attribute. Then copying any
    value of the right kind is not enough.
    """
    attributes = world.lexicon.attributes
    values = [[tokenizer.encode(f" {value}") for value in a.values] for a in attributes]
    prompts, options, pairs = [], [], []
    for n, person in enumerate(people):
        for a, attribute in enumerate(attributes):
            integers, size = raw_integers(world.seed, TASKS, 22, n, a), len(attribute.values)
            value = person.values[a]
            target = value if agrees else (value + 1 + next(integers) % (size - 1)) % size
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
    likeliest = np.array([[row.argmax()] for row in logp])
    rates = (wilson(int(count), len(pairs)) for count in (likeliest == np.array(pairs)).sum(0))
    return Memories(*rates, float(np.mean(nats)))


# --- heads --------------------------------------------------------------------------------------------------


def attention(model: GPT, ids: Array) -> Array:
    """Attention probabilities (n_layer, B, H, T, T), queries (rows) over keys, for ids (B, T)."""
    maps = []

    def watched(*args, **named) -> tuple:
        out, cache = ops.attention_forward(*args, **named)
        maps.append(cache[3])
        return out, cache

    watching = copy.copy(model)
    watching.ops = SimpleNamespace(**vars(ops) | {"attention_forward": watched})
    watching.forward(ids)
    return np.stack(maps)


def induction_scores(model: GPT, tokens: Sequence[int], count: int = 50) -> Array:
    """The share of each head's attention that an induction head gives to one earlier token, (n_layer, H).

    This token followed the earlier occurrence of the present token. A head that attends to all places equally
    has 1 / 25 or less.
    """
    return _looking_back(model, tokens, count, LENGTH - 1)


def previous_scores(model: GPT, tokens: Sequence[int], count: int = 50) -> Array:
    """The share of each head's attention that goes to the previous token, (n_layer, H).

    A head with a high share adds the previous token to each token's vector. Induction heads of later layers
    need this information.
    """
    return _looking_back(model, tokens, count, 1)


LENGTH = 25  # random tokens


def _looking_back(model: GPT, tokens: Sequence[int], count: int, distance: int) -> Array:
    """The mean attention to the place `distance` tokens earlier, (n_layer, H).

    The mean is over the second half of each of `count` texts. The second half repeats the random tokens of
    the first half: only the first half shows which token comes next.
    """
    rng = np.random.default_rng(0)
    once = np.stack([rng.choice(tokens, LENGTH, replace=False) for _ in range(count)])
    maps = attention(model, np.concatenate([once, once], 1).astype(np.int32))
    query = np.arange(LENGTH, 2 * LENGTH - 1)
    return maps[..., query, query - distance].mean(axis=(1, 3))


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
    shape: tuple[int, int], heads: Sequence[Head], sets: int, exceptions: Sequence[Head] = ()
) -> list[list[Head]]:
    """`sets` random choices of heads. Each has as many heads as `heads`, and none of `heads` or `exceptions`.

    shape: n_layer, n_head.

    Where fewer other heads are left, each choice has all of them.
    """
    rest = [head for head in np.ndindex(shape) if head not in {*heads, *exceptions}]
    rng = np.random.default_rng(0)
    return [[rest[i] for i in rng.permutation(len(rest))[: len(heads)]] for _ in range(sets)]
