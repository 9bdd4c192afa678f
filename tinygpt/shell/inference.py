"""The commands merge, generate, look and fewshot for a trained model, and those for a tokenizer."""

import math
import sys
from pathlib import Path

import click
import numpy as np

from ..errors import UserError
from ..files.atomic import lock, make_folder, replacing
from ..folders import adapters, runs
from ..lab import look as looking
from ..lab import report
from ..stages import fewshot as prompting
from ..text import instructions
from ..text import tokenizer as tokenizers
from ..text.data import about, documents, joined
from ..text.examples import USUAL, Notes
from ..text.stream import encode_prompt
from ..text.tokenizer import BPETokenizer
from ..world import corpus
from .chat import speaker
from .options import (
    COUNT,
    COUNT_OR_0,
    DATA,
    FILE,
    FOLDER,
    MORE_THAN_0,
    adapter_folder_option,
    check_out,
    out,
    sampling,
)
from .progress import command, shown_token
from .terminal import from_stdin, say
from .worlds import world_of


@click.command()
@click.argument("folder", type=FOLDER)
@adapter_folder_option
@out("merged")
def merge(folder: Path, adapter_folder: Path | None, out: Path, overwrite: bool) -> None:
    """Add a LoRA adapter to the weights of the model in FOLDER: a plain model, with the same speed."""
    if adapter_folder is None:
        raise click.UsageError("name the adapter as --adapter-folder")
    runs.check_folder(out, overwrite, needed=(folder, adapter_folder))
    model, tokenizer = adapters.load_model(folder, adapter_folder)
    runs.save_model(out, model.merge(), tokenizer)
    say(f"Saved in {out}. Next: {command('generate', str(out))}")


@click.command()
@sampling(stop="", shown="none")
@click.option("--prompt", default="", help="The text to continue; - reads standard input.")
@click.option("--special-tokens", is_flag=True, help="Names such as <|endoftext|> in the prompt are tokens.")
@click.option("--num-samples", default=1, type=COUNT, help="The number of texts; dashes separate them.")
def generate(prompt: str, special_tokens: bool, num_samples: int, stop: str, **options) -> None:
    """Let the model in FOLDER (tinygpt's, or GPT-2 as downloaded from the hub) continue a text.

    Prints the prompt and then each token at once. Without a prompt the model begins a text. A model that was
    tuned to instructions answers in tinygpt chat.
    """
    _, tokenizer, continuation = speaker(**options)
    if prompt == "-":
        prompt = from_stdin(lambda: sys.stdin.read()).removesuffix("\n")
    ids = encode_prompt(tokenizer, prompt, special_tokens)
    for n in range(num_samples):
        say("-" * 15 + "\n" + prompt if n else prompt, nl=False)
        for piece in continuation(ids, stop):
            say(piece, nl=False)
        say()


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("text")
@adapter_folder_option
@click.option("--answer", default="", show_default="none", help="The answer to TEXT; only it is learned.")
@click.option("--token", type=COUNT, show_default="the third", help="Show all numbers of its rows.")
@click.option("--lr", default=1e-3, type=MORE_THAN_0, help="The learning rate of the update.")
@click.option("--out", default="look.html", type=FILE, help="The page.")
@click.option("--overwrite", is_flag=True, help="Replace the file that is there.")
def look(folder: Path, text: str, adapter_folder: Path | None, answer: str, token: int | None, lr: float,
         out: Path, overwrite: bool) -> None:  # fmt: skip
    """See one training step of the model in FOLDER on TEXT, as an HTML page. The page needs no internet.

    The page goes through the operations of forward, loss, backward and update. The code of each operation, in
    NumPy, stands beside the arrays that the operation read and computed. Other views show the attention of
    each head, the prediction after each layer, and the gradient. The model's files do not change.
    """
    if out.suffix != ".html":
        raise UserError(f"--out is '{out}': the name of a page ends in .html")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; --overwrite replaces it, --out names another file")
    model, tokenizer = adapters.load_model(folder, adapter_folder)
    if answer:
        ids, learned = instructions.encode(tokenizer, instructions.pair(text, answer))
    else:
        ids = encode_prompt(tokenizer, text)
        learned = np.ones(len(ids), bool)

    def label(i: int) -> str:
        return shown_token(tokenizer.tokens[i]) if i < tokenizer.vocab_size else f"id {i}"

    page = looking.html(looking.observe(model, ids, learned, label, token or min(3, len(ids) - 1), lr))
    with replacing(out.resolve()) as path:  # a link stays a link
        path.write_text(page, encoding="utf-8")
    say(f"Saved {out}, {len(page.encode()) / 1e6:.1f} MB: open it in a browser.")


@click.command()
@click.argument("folder", type=FOLDER)
@adapter_folder_option
@click.option("--data", type=DATA, metavar="FILE", show_default="the world that the model was trained on",
              help=f'JSON Lines: {USUAL[1]}, perhaps with "choices": [...], or another form of '
                   "demos/formats.md; or the folder of tinygpt world, or world:SEED.")  # fmt: skip
@click.option("--task", default="mappings",
              type=click.Choice(("mappings", "people", "questions", "phrases", "reviews")),
              help="Of the world. mappings: words whose labels are new in each prompt.")  # fmt: skip
@click.option("--shots", multiple=True, type=COUNT_OR_0, default=(0, 1, 2, 4, 8),
              help="Number of examples before the question; repeat.")  # fmt: skip
@click.option("--style", type=click.Choice(("table", "arrow", "colon", "lines", "chat")),
              show_default="chat after tinygpt sft, else as the world has it",
              help="The form of examples; chat: as earlier turns.")  # fmt: skip
@click.option("--control", type=click.Choice(("", "shuffled", "unseen", "reordered")), default="",
              show_default="none", metavar="NAME", help="Of mappings: shuffled labels, an unseen word as the "
                                                        "question, or reordered examples.")  # fmt: skip
@click.option("--free", is_flag=True, help="The model writes the answer, instead of scoring the choices.")
@click.option("--count", default=500, type=COUNT, help="Number of questions.")
@click.option("--seed", default=1337, type=COUNT_OR_0, help="Seed of the examples from a file.")
def fewshot(folder, adapter_folder, data, task, shots, style, control, free, count, seed) -> None:
    """Ask the model in FOLDER with examples before the question. No weight changes.

    Prints a row for each number of examples: the rate of right answers. The answer is the likeliest of the
    choices, or with --free the text that the model writes. Mappings also have the rate of the best possible
    predictor.
    """
    model, tokenizer = adapters.load_model(folder, adapter_folder)
    usual = "table" if task == "mappings" else "arrow"  # as the corpus has them
    style = style or ("chat" if instructions.is_tuned(tokenizer) else usual)
    data = data or world_of(folder, "questions")
    world = corpus.world_of(data) if corpus.is_source(data) else None
    if control and (world is None or task != "mappings"):
        raise click.UsageError("--control is for --task mappings")
    notes = Notes()
    rows = None if world else prompting.read(data, model, tokenizer, style, notes)
    if notes:
        say(notes)
    some = sum(bool(choices) for *_, choices in rows or ())
    if rows and not free and 0 < some < len(rows):
        raise UserError(f"{data}: only {some} of {len(rows)} lines have choices: add them, or give --free")
    for n, k in enumerate(sorted(set(shots))):
        if world is None:
            drawn = prompting.from_file(rows, k, count, seed)
            fitting = [p for p in drawn if prompting.fits(model, tokenizer, p, style)]
            if n and not fitting:
                say(f"With {k} examples no prompt fits the {model.context} positions of the model.")
                break
            prompts = fitting or drawn  # if no prompt fits, `accuracy` raises UserError
            if left_out := len(drawn) - len(prompts):
                say(f"Left out, as longer than {model.context} tokens with {k} examples: {left_out:,}")
        elif task == "mappings":
            prompts = prompting.mappings(world, k, count, control)
        else:
            prompts = prompting.from_world(world, task, k, count)
        rate = prompting.accuracy(model, tokenizer, prompts, style, free)
        best = sum(prompt.optimal for prompt in prompts) / len(prompts)
        has_best = not math.isnan(best)
        if not n:
            head = f"{'examples':>8} {'right':>9}  95% interval {'of':>9}"
            say(head + f"  {'best possible':>13}" * has_best)
        say(f"{k:8} {report.interval(rate)} {rate.n:7,}" + f"  {best:13.3f}" * has_best)
    shown = tokenizer.decode(prompting.encoded(tokenizer, prompts[0], style))
    say(f"\nThe first prompt of the last row, and its right answer:\n{shown} | {prompts[0].answer}")


@click.group()
def tokenizer() -> None:
    """Train a byte-level BPE tokenizer, or show its tokens of a text."""


@tokenizer.command("train")
@click.option("--data", type=DATA, multiple=True, show_default="Python's own documentation", help=
              "A UTF-8 text file, or a folder of .txt, .md and .rst files; repeat for several.")  # fmt: skip
@click.option("--plain-text", is_flag=True, help=f"Take {tokenizers.END_OF_TEXT} in a file as text.")
@click.option("--vocab-size", default=1024, type=COUNT, help="256 bytes, 1 end of text, merges.")
@out("tokenizer", "tokenizer", holds="the files")
def tokenizer_train(data: tuple[str, ...], plain_text: bool, vocab_size: int, out: Path,
                    overwrite: bool) -> None:  # fmt: skip
    """Learn merges from a text: again and again, the most frequent pair of tokens becomes one token."""
    if (out / "config.json").exists():
        raise UserError(f"{out}: has a model, and needs its own tokenizer; name another folder")
    check_out(out, "tokenizer.json", "tokenizer", overwrite)
    texts = documents(data, plain_text)
    bpe = BPETokenizer.train(joined(texts), vocab_size)
    make_folder(out)
    lock(out)
    bpe.save(out)
    longest = sorted(set(bpe.tokens) - {name.encode() for name in bpe.special}, key=len)[-5:]
    say(f"{bpe.vocab_size} tokens, the longest {' '.join(map(shown_token, longest))}{about(texts)}")
    say(f"Saved in {out}. Next: {command('tokenizer', 'show', str(out), 'some text')}")


@tokenizer.command("show")
@click.argument("folder", type=FOLDER)
@click.argument("text")
def tokenizer_show(folder: Path, text: str) -> None:
    """Show how the tokenizer in FOLDER splits TEXT: the pieces, each merge in order, the ids.

    The number of a merge is its rank. The pair with the lowest rank in a piece is merged first.
    """
    count = 0
    for piece, steps, ids in tokenizers.load(folder).explain(text):
        say(repr(piece))
        for rank, tokens in steps:
            name = "bytes" if rank is None else f"merge {rank}"
            say(f"  {name:>12}  {' '.join(map(shown_token, tokens))}")
        say(f"  {'ids':>12}  {' '.join(map(str, ids))}")
        count += len(ids)
    say(f"{count} tokens for {len(text)} characters")
