"""A conversation with one model, or with several models that get the same questions."""

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import numpy as np

from ..errors import UserError
from ..folders.adapters import load_model
from ..lab import texts
from ..text import instructions
from ..text.stream import encode_prompt, note_special, stream, until
from .options import FOLDER, lang, sampling, written_options
from .terminal import from_stdin, is_terminal, one_line, say


def speaker(folder: Path, adapter_folder: Path | None, seed: int, dtype: str, **sampling):
    """The model, the tokenizer, and a function that continues ids up to a stop text."""
    model, tokenizer = load_model(folder, adapter_folder)
    model.compute_in(dtype)
    sampling["rng"] = np.random.default_rng(seed)
    return model, tokenizer, lambda ids, stop: until(stream(model, tokenizer, ids, **sampling), stop)


@click.command()
@sampling(None, "a blank line; none after tinygpt sft", "0.8; of a story 0", required=False)
@click.option("--story", "story_folder", type=FOLDER, help="Talk to a model of this story instead.")
@click.option("--stage", default="sft", metavar="NAME", help="base, sft, rlhf, lora or ptuning.")
@click.option("--compare", metavar="NAME,NAME", help="Several stages get the same questions.")
@lang
def chat(folder: Path | None, story_folder: Path | None, stage: str, compare: str | None, stop: str | None,
         adapter_folder: Path | None, language: str, **options) -> None:  # fmt: skip
    """Talk with the model in FOLDER, line by line; Ctrl-D ends it. An empty line is no question.

    A model that was tuned to instructions (tinygpt sft) gets your line as a question. Any other model
    continues the conversation as plain text. The oldest lines are forgotten when the context is full. A
    story's model, and an untuned model of a world, read each line alone.
    """
    from ..lab import story  # generate does not need the laboratory

    names_stage = "stage" in written_options()
    if story_folder and "temperature" not in written_options():
        options["temperature"] = 0.0  # as the story's own samples
    if (folder and story_folder) or not (folder or story_folder or compare or names_stage):
        raise click.UsageError("say which model: FOLDER, or a story's as --story FOLDER --stage NAME")
    if story_folder is None:
        if compare or names_stage:
            raise click.UsageError("--stage and --compare are of a story: name it as --story FOLDER")
        partners = {"": talker(folder, adapter_folder, stop, False, **options)}
    elif adapter_folder:
        raise click.UsageError("--story has its own adapters: leave out --adapter-folder")
    elif compare and names_stage:
        raise click.UsageError("--compare names the stages: leave out --stage")
    else:
        names = [name.strip() for name in compare.split(",")] if compare else [stage]
        partners = {name: talker(*story.where(story_folder, name), stop, True, **options) for name in names}
    person = is_terminal(sys.stdin)
    if story_folder and person:
        say(texts.text(language, "chat world"))
        say(texts.text(language, "chat begin"))
        say("\n".join(f"  {question}" for question in story.questions(story_folder)))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = from_stdin(lambda: input("> " if person else ""))
            if not line.strip():
                continue
            for name, talk in partners.items():
                try:
                    pieces = talk(line)
                except UserError as error:
                    if not person:
                        raise
                    say(f"tinygpt: {one_line(error)}", err=True)  # the next line may be right
                    continue
                say(f"{name + ':':9}" if compare else "", nl=False)
                for piece in pieces:
                    say(piece, nl=False)
                say()
    if person:
        say()


def talker(
    folder: Path, adapter_folder: Path | None, stop: str | None, alone: bool, **options
) -> Callable:
    """A function from a line to the pieces of the answer. Unless `alone`, it remembers the conversation."""
    model, tokenizer, continuation = speaker(folder, adapter_folder, **options)
    size, tuned = model.context, instructions.is_tuned(tokenizer)
    stop = ("" if tuned else "\n\n") if stop is None else stop
    turns, context = [], np.array(tokenizer.begin, np.int32)

    def prompt_of(line: str) -> np.ndarray:
        note_special(tokenizer, line, "the message")
        if not tuned and tokenizer.documents:  # each line begins a new document
            return encode_prompt(tokenizer, line)
        if not tuned:
            new = tokenizer.encode(line + "\n")
            return np.concatenate([context, new])[-max(size, len(new)) :]
        turn = {"role": "user", "content": line}
        while turns and len(instructions.prompt(tokenizer, [*turns, turn])) > size // 2:
            del turns[:2]  # the other half is for the answer
        return instructions.prompt(tokenizer, [*turns, turn])

    def answer_to(line: str, ids: np.ndarray) -> Iterable[str]:
        nonlocal context
        answer, in_text = "", not tuned
        for piece in filter(None, continuation(ids, stop)):
            piece = piece if in_text else piece.removeprefix(" ")  # as `instructions.answer_content`
            in_text = True
            yield piece
            answer += piece
        if alone:
            return
        turns.extend(instructions.pair(line, answer))
        context = np.concatenate([ids, tokenizer.encode(answer + (stop or "\n"))])

    return lambda line: answer_to(line, prompt_of(line))
