"""A person compares answers of a model, with one key each. The file has each comparison at once."""

import itertools
import json
import sys
from pathlib import Path

import click
import numpy as np

from ..errors import UserError
from ..folders import checkpoint
from ..stages.reward import read_file
from ..stages.rlhf import read_prompts
from ..stages.samples import prompt_ids, sample
from ..text import instructions
from ..text.examples import USUAL, Notes
from ..world import corpus
from .options import COUNT, COUNT_OR_0, DATA, FOLDER, PATH
from .progress import command
from .terminal import from_stdin, is_terminal, say
from .worlds import world_of

TEMPERATURES = (1.0, 1.5, 2.0)  # the next one is tried where all answers are equal


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--data", type=DATA, metavar="FILE", show_default="the world that the model was trained on",
              help=f"JSON Lines: {USUAL[0]}, or another form of demos/formats.md; or a folder of "
                   "tinygpt world, or world:SEED.")  # fmt: skip
@click.option("--out", default="comparisons.jsonl", type=PATH, help="The file.")
@click.option("--max-new-tokens", default=16, type=COUNT, help="Length of an answer.")
@click.option("--refusal", metavar="TEXT", help="A second answer where all answers are equal, such as "
                                                "'I do not know.'")  # fmt: skip
@click.option("--seed", default=1337, type=COUNT_OR_0, help="Seed of prompts and answers.")
def label(folder: Path, data: str, out: Path, max_new_tokens: int, refusal: str | None, seed: int) -> None:
    """Compare two answers of the tuned model in FOLDER, again and again. tinygpt reward learns from these.

    The keys: 1 or 2 for the better answer, s to skip, q to stop. The file has each comparison at once. The
    same command continues after the last comparison.
    """
    model, tokenizer = checkpoint.load(folder)
    instructions.check_tuned(tokenizer, folder)
    data = data or world_of(folder, "prompts")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder")
    earlier, content = (read_file(out), out.read_bytes()) if out.exists() else ([], b"")
    if content.strip().endswith(b"]"):
        raise UserError(f"{out}: is one list, and label adds lines; --out names another file")
    between = "\n" * (content[-1:] not in (b"", b"\n"))
    count, pairs_before = len(earlier), {(c.prompt, frozenset((c.chosen, c.rejected))) for c in earlier}
    notes = Notes()
    items = [(item.get("where", ""), item) for item in read_prompts(data, notes)]
    size = max_new_tokens
    prompts = notes.keep(items, lambda item: (item, prompt_ids(model, tokenizer, item["prompt"], size)))
    order = np.random.default_rng(seed).permutation(len(prompts))
    keys, in_world = "1 or 2: the better one; s: skip; q: stop", corpus.is_source(data)
    say(f"{notes}\n{keys}" if notes else keys)
    last = count
    for n in itertools.count(count):
        if n - last > len(prompts):  # each prompt has one answer only, or a pair that was compared before
            say("There is nothing left to compare. Try another --seed or other prompts.")
            break
        (item, ids), rng = prompts[order[n % len(prompts)]], np.random.default_rng([seed, n])
        prompt, texts = item["prompt"], {}  # the keys keep the order of the answers
        for temperature in TEMPERATURES:
            if len(texts) < 2:
                answers = sample(model, tokenizer, [ids], 8, max_new_tokens, rng, temperature).answers
                texts |= dict.fromkeys(filter(str.strip, answers))
        pair = list(texts | ({refusal: None} if refusal else {}))[:2]
        if len(pair) < 2 or (prompt, frozenset(pair)) in pairs_before:
            continue
        pairs_before.add((prompt, frozenset(pair)))
        last = n
        say(f"\n{count + 1}. {instructions.shown(prompt)}\n  1  {pair[0]}\n  2  {pair[1]}")
        if in_world:
            remark = "" if item["meta"]["exposure"] else " But no text told the model so."
            say(f"     (true: {item['meta']['answer']}.{remark})")
        key = ""
        while key not in ("1", "2", "s", "q"):
            if key.strip():
                say(f"     {keys}")
            key = key_pressed()
        if key == "q":
            break
        if key != "s":
            chosen, rejected = pair if key == "1" else pair[::-1]
            turns = prompt if isinstance(prompt, str) else instructions.turns(prompt)
            row = {"prompt": turns, "chosen": chosen, "rejected": rejected}
            with open(out, "a", encoding="utf-8") as file:
                file.write(between + json.dumps(row, ensure_ascii=False) + "\n")
            count, between = count + 1, ""
    say(f"{count} comparisons in {out}." + " Next, with a judge or without:" * bool(count))
    for words in (["reward"], ["rlhf", "--algo", "dpo"]) if count else ():
        say("  " + command(*words, "--init-from", str(folder), "--data", str(out)))


def key_pressed() -> str:
    """The next key, or "q" where there is none."""
    try:
        keys = click.getchar() if is_terminal(sys.stdin) else from_stdin(lambda: sys.stdin.read(1))
        return keys[:1] or "q"
    except (EOFError, KeyboardInterrupt):
        return "q"
