"""People who compare two answers, simulated: they know the truth, and they slip.

Their utility is known: a right answer is better than REFUSAL, and that is better than a wrong one. With
`blind` it ignores truth, any value is better than REFUSAL: a control for whoever learns from them.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import TASKS, World, raw_integers
from .chance import pick
from .tasks import REFUSAL, Item, form, right

NAMES = {1: "right", 0: "don't know", -1: "wrong"}
RESOLUTION = 10_000  # of the error rate


def utility(world: World, item: Item, answer: str) -> int:
    """1, 0 or -1; what is no answer at all is wrong. About people who are in no document nothing is right."""
    if answer == REFUSAL:
        return 0
    known = item["meta"]["exposure"] > 0
    return 1 if known and form(world, "question").fullmatch(answer) and right(item, answer) else -1


def compared(
    world: World, asked: Sequence[tuple[Item, Sequence[str]]], count: int, error: float = 0.1,
    stream: int = 0, blind: bool = False,
) -> list[dict]:  # fmt: skip
    """`count` comparisons of two answers to a question: {"prompt", "chosen", "rejected", "meta"}.

    asked: questions (`tasks.questions`), each with answers. Two of equal utility are not compared. `error`
    is the rate of slips. meta has the `kind`, "right over wrong", and whether that is what was said.
    """
    integers, found = raw_integers(world.seed, TASKS, 30, stream), []
    asked = [(item, answers) for item, answers in asked
             if len({utility(world, item, answer) for answer in answers}) > 1]  # fmt: skip
    if not asked:
        raise ValueError("no question has two answers of different utility")
    while len(found) < count:
        item, answers = pick(asked, integers)
        pair = [pick(answers, integers), pick(answers, integers)]
        pair.sort(key=lambda answer: utility(world, item, answer), reverse=True)
        better, worse = (utility(world, item, answer) for answer in pair)
        if better == worse:
            continue
        swapped = False
        if blind:  # REFUSAL is worst, of the others each is as good as any
            swapped = pair[0] == REFUSAL or (REFUSAL not in pair and next(integers) % 2 == 1)
        slip = next(integers) % RESOLUTION < error * RESOLUTION
        chosen, rejected = pair[:: -1 if slip != swapped else 1]
        found.append({
            "prompt": item["prompt"], "chosen": chosen, "rejected": rejected,
            "meta": {"kind": f"{NAMES[better]} over {NAMES[worse]}", "is_right": slip == swapped},
        })  # fmt: skip
    return found
