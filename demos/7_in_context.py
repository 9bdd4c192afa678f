"""Demo 7: in-context learning. The model of demo 1 is asked, with examples in the prompt; no weight changes.

    .venv/bin/python demos/7_in_context.py [FOLDER]

"hat dax, dog wug, fox wug, skirt" - what follows? Which label stands for which kind of thing is drawn anew
for each prompt, so nothing in the weights can know it; the best possible predictor is exactly known. Facts
that the prompt tells are used in the same way, also where they contradict the weights; but not whose they
are. All of it is read by a few attention heads, which can be found and knocked out.
"""

from pathlib import Path

import common
import numpy as np

from tinygpt.folders.adapters import fingerprint
from tinygpt.shell.terminal import say
from tinygpt.stages import evaluate, fewshot, recall
from tinygpt.world import World

SHOTS, COUNT = (0, 1, 2, 4, 8, 16), 500


def main(folder: Path) -> None:
    model, tokenizer = common.pretrained(folder)
    world, mark = World(common.SEED), fingerprint(model)

    # 1. Learning from examples, beside the best that is possible.
    prompt = fewshot.mappings(world, 8, COUNT)[0]
    say(f"{fewshot.text(prompt, 'table')} |{fewshot.likeliest(model, tokenizer, [prompt], 'table')[0]}")
    print(f"\n{'examples':24}" + "".join(f"{shots:8}" for shots in SHOTS))
    for control, note in (
        ("", "right"), ("unseen", "a word not among them"), ("shuffled", "with shuffled labels"),
    ):  # fmt: skip
        prompts = [fewshot.mappings(world, shots, COUNT, control) for shots in SHOTS]
        if not control:
            best = "".join(f"{np.mean([p.optimal for p in some]):8.3f}" for some in prompts)
            print(f"{'the best possible':24}{best}")
        rates = (fewshot.accuracy(model, tokenizer, some).rate for some in prompts)
        print(f"{note:24}" + "".join(f"{rate:8.3f}" for rate in rates))

    # 2. The two memories: the prompt says one thing, the weights another.
    print(f"\n{'the prompt says so':18}{'by the prompt':>15}{'by the weights':>16}{'nats for it':>13}")
    for kind, repeats in (("known", 1), ("known", 4), ("never", 1)):
        people = world.people(kind, "eval")[:50]
        told = recall.memories(model, tokenizer, world, people, repeats)
        note = f"{repeats} x, {kind}"
        print(f"{note:18}{told.prompt.rate:15.3f}{told.weights.rate:16.3f}{told.nats:13.2f}")
    never = world.people("never", "eval")[:50]
    alone, both = (recall.memories(model, tokenizer, world, never, own=True, rival=rival).prompt
                   for rival in (False, True))  # fmt: skip
    print(f"\nFacts that the prompt tells of people never seen: {alone.rate:.0%} right; {both.rate:.0%}")
    print("where it tells them of somebody else too (to copy either gives 50%): is it read whose they are?")

    # 3. Who reads the prompt: heads that look at what followed the same word before (induction heads), and
    # those of an earlier layer that look at the token before, and so tell them what a word followed.
    words = [int(tokenizer.encode(f" {word}")[0]) for word in world.things]
    scores = recall.induction_scores(model, words)
    print("\nAttention to what followed the same word before, by layer and head:")
    for layer, row in enumerate(scores):
        print(f"  layer {layer}" + "".join(f"{score:8.2f}" for score in row))
    heads, before = recall.strongest(scores), recall.strongest(recall.previous_scores(model, words))
    others = recall.others(scores.shape, heads, 1, before)[0]
    eight, known = fewshot.mappings(world, 8, COUNT), world.people("known")
    print(f"\n{'':24}{'8 examples':>12}{'facts of the prompt':>21}{'facts of the weights':>22}")
    for note, removed in (
        ("all heads", []), (f"without these {len(heads)}", heads), (f"without {len(others)} others", others),
        (f"without {len(before)} that look back", before),
    ):  # fmt: skip
        cut = recall.without(model, removed)
        cells = f"{fewshot.accuracy(cut, tokenizer, eight).rate:12.3f}"
        cells += f"{recall.memories(cut, tokenizer, world, never, own=True).prompt.rate:21.3f}"
        cells += f"{evaluate.recall(cut, tokenizer, world, known).rate().rate:22.3f}"
        print(f"{note:24}{cells}")

    same = fingerprint(model) == mark
    print(f"\nAfter all these prompts the weights are {'the same, bit for bit' if same else 'DIFFERENT'}.")


if __name__ == "__main__":
    with common.command_line(__doc__) as folder:
        main(folder)
