"""Demo 7: in-context learning. The prompt teaches the model of demo 1. No weight changes.

    .venv/bin/python demos/7_in_context.py [FOLDER]

"hat dax, dog wug, fox wug, skirt": which word follows? Each prompt has new labels (dax, wug), drawn by
chance. No weight can know these labels, and the best possible predictor is known exactly.

The demo shows four things. The model learns from examples in the prompt. It uses a fact that a user writes in
the prompt, and the fact is gone with the prompt. The prompt wins over the weights where they contradict. A
few attention heads read the prompt: the demo finds them and removes them.
"""

from pathlib import Path

import common
import numpy as np

from tinygpt.core.generate import generate
from tinygpt.core.model import GPT
from tinygpt.folders.adapters import fingerprint
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, fewshot, recall
from tinygpt.text.data import Tokenizer
from tinygpt.text.stream import encode_prompt
from tinygpt.world import World

SHOTS, COUNT = (0, 1, 2, 4, 8, 16), 500


def learning_from_examples(model: GPT, tokenizer: Tokenizer, world: World) -> None:
    """Rates of right answers, beside those of the best possible predictor."""
    prompt = fewshot.mappings(world, 8, COUNT)[0]
    say(f"{fewshot.text(prompt, 'table')} |{fewshot.likeliest(model, tokenizer, [prompt], 'table')[0]}")
    print(f"\n{'examples':24}" + "".join(f"{shots:8}" for shots in SHOTS))
    for control, note in (
        ("", "right"), ("unseen", "a word not among them"), ("shuffled", "with shuffled labels"),
    ):  # fmt: skip
        prompts = [fewshot.mappings(world, shots, COUNT, control) for shots in SHOTS]
        if not control:
            best = "".join(f"{np.mean([p.optimal for p in row]):8.3f}" for row in prompts)
            print(f"{'the best possible':24}{best}")
        rates = (fewshot.accuracy(model, tokenizer, row).rate for row in prompts)
        print(f"{note:24}" + "".join(f"{rate:8.3f}" for rate in rates))


def a_users_fact(model: GPT, tokenizer: Tokenizer, world: World) -> None:
    """For one user, in real time."""
    user, city = world.people("never", "eval")[0], world.lexicon.attributes[0]
    fact = f"{user.name} {city.wordings[1]} {city.values[user.values[0]]}. "
    print()
    for note, begin in (("without the fact", ""), ("with the fact", fact), ("without it again", "")):
        text = f"{begin}{user.name} {city.wordings[0]}"
        answer = generate(model, [encode_prompt(tokenizer, text)], 1, temperature=0)[0]
        say(f"{note:18}{text} |{tokenizer.decode(answer)}")


def two_memories(model: GPT, tokenizer: Tokenizer, world: World) -> None:
    """The prompt says one thing, the weights say another."""
    print(f"\n{'said in the prompt':18}{'prompt wins':>15}{'weights win':>16}{'nats apart':>13}")
    for kind, repeats in (("known", 1), ("known", 4), ("never", 1)):
        people = world.people(kind, "eval")[:50]
        memory = recall.memories(model, tokenizer, world, people, repeats)
        note = f"{repeats} x, {kind}"
        print(f"{note:18}{memory.prompt.rate:15.3f}{memory.weights.rate:16.3f}{memory.nats:13.2f}")
    never = world.people("never", "eval")[:50]
    alone, both = (recall.memories(model, tokenizer, world, never, agrees=True, rival=rival).prompt
                   for rival in (False, True))  # fmt: skip
    print(f"\nThe prompt tells a fact about a person never seen: {alone.rate:.0%} right.")
    print(f"The prompt tells facts about two such people: {both.rate:.0%} right. Copying either gives 50%.")


def heads_that_read_the_prompt(model: GPT, tokenizer: Tokenizer, world: World) -> None:
    """Induction heads look at the token that followed an earlier occurrence of the same word.

    Heads of an earlier layer look at the previous token. Induction heads need this information.
    """
    words = [int(tokenizer.encode(f" {word}")[0]) for word in world.things]
    scores = recall.induction_scores(model, words)
    print("\nAttention to the token that followed the same word earlier, by layer and head:")
    for layer, row in enumerate(scores):
        print(f"  layer {layer}" + "".join(f"{score:8.2f}" for score in row))
    heads, before = recall.strongest(scores), recall.strongest(recall.previous_scores(model, words))
    others = recall.others(scores.shape, heads, 1, before)[0]
    eight, people = fewshot.mappings(world, 8, COUNT), world.people("known")
    never = world.people("never", "eval")[:50]
    print(f"\n{'':24}{'8 examples':>12}{'facts of the prompt':>21}{'facts of the weights':>22}")
    for note, removed in (
        ("all heads", []), (f"without these {len(heads)}", heads), (f"without {len(others)} others", others),
        (f"without {len(before)} that look back", before),
    ):  # fmt: skip
        cut = recall.without(model, removed)
        cells = f"{fewshot.accuracy(cut, tokenizer, eight).rate:12.3f}"
        cells += f"{recall.memories(cut, tokenizer, world, never, agrees=True).prompt.rate:21.3f}"
        cells += f"{evaluate.recall(cut, tokenizer, world, people).rate().rate:22.3f}"
        print(f"{note:24}{cells}")


def main(folder: Path) -> None:
    model, tokenizer = common.pretrained(folder)
    world, mark = World(common.SEED), fingerprint(model)
    for part in (learning_from_examples, a_users_fact, two_memories, heads_that_read_the_prompt):
        part(model, tokenizer, world)
    same = fingerprint(model) == mark
    print(f"\nAfter all these prompts the weights are {'the same, bit for bit' if same else 'DIFFERENT'}.")
    print("Next: demos/8_three_adapters.py")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
