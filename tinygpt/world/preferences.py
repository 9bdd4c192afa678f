"""Simulated people who compare two answers. They know the truth, and they slip.

Their utility is known: a right answer is better than REFUSAL, and REFUSAL is better than a wrong answer. With
`blind` the utility ignores the truth: each value is as good as the right one. This is a control for judges.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import TASKS, World, raw_integers
from .chance import pick
from .tasks import REFUSAL, Item, form, right

NAMES = {1: "right", 0: "don't know", -1: "wrong"}
RESOLUTION = 10_000  # of the error rate


def utility(world: World, item: Item, answer: str, blind: bool = False) -> int:
    """1, 0 or -1. A garbled answer is wrong. About people in no document no answer is right."""
    if answer == REFUSAL:
        return 0
    true = blind or (item["meta"]["exposure"] > 0 and right(item, answer))
    return 1 if true and form(world, "question").fullmatch(answer) else -1


def compared(
    world: World, questions: Sequence[tuple[Item, Sequence[str]]], count: int, error: float = 0.1,
    stream: int = 0, blind: bool = False,
) -> list[dict]:  # fmt: skip
    """`count` comparisons of two answers to a question: {"prompt", "chosen", "rejected", "meta"}.

    questions: items of `tasks.questions`, each with answers. Two answers of equal utility are not compared.
    `error` is the rate of slips. meta has the `kind`, such as "right over wrong" or "right over garbled", and
    `is_right`, which is false for a slip. A garbled answer is as bad as a wrong answer.
    """
    integers, rows = raw_integers(world.seed, TASKS, 30, stream), []
    questions = [(item, answers) for item, answers in questions
             if len({utility(world, item, answer, blind) for answer in answers}) > 1]  # fmt: skip
    if not questions:
        raise ValueError("no question has two answers of different utility")
    while len(rows) < count:
        item, answers = pick(questions, integers)
        pair = [pick(answers, integers), pick(answers, integers)]
        pair.sort(key=lambda answer: utility(world, item, answer, blind), reverse=True)
        better, worse = (utility(world, item, answer, blind) for answer in pair)
        if better == worse:
            continue
        slip = next(integers) % RESOLUTION < error * RESOLUTION
        chosen, rejected = pair[:: -1 if slip else 1]
        other = NAMES[worse] if form(world, "question").fullmatch(pair[1]) else "garbled"
        meta = {"kind": f"{NAMES[better]} over {other}", "is_right": not slip}
        rows.append({"prompt": item["prompt"], "chosen": chosen, "rejected": rejected, "meta": meta})
    return rows
