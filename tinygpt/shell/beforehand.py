"""Before a stage begins: examples are printed, simulated people compare answers."""

import dataclasses
import hashlib
from pathlib import Path

from ..core.parallel import Group
from ..errors import UserError
from ..folders import checkpoint, runs
from ..stages import reward
from ..stages.sft import read_examples
from ..text import instructions, tokenizer
from ..text.examples import Notes
from ..world import corpus
from .progress import shown_token
from .terminal import say


def show(init_from: str, data: tuple[str, ...], count: int) -> None:
    """Prints the first examples as the training sees them: each token, and whether the token is learned."""
    tok, notes = tokenizer.load(init_from), Notes()
    for example in read_examples(data, "sft", notes)[:count]:
        ids, learned = instructions.encode(tok, example.messages)
        say(f"{example.where}: {len(ids)} tokens, {learned.sum()} learned")
        for i, is_learned in zip(ids.tolist(), learned.tolist(), strict=True):
            say(f"  {'learned' if is_learned else '-':8}{i:6}  {shown_token(tok.tokens[i])}")
    if notes:
        say(notes)


def _compare(settings: reward.Settings, out: Path, overwrite: bool, group: Group) -> reward.Settings:
    """The settings with a file of comparisons in place of a world. Simulated people make the comparisons.
    Process 0 writes the file, and the other processes read it."""
    if not any(map(corpus.is_source, settings.data)):
        return settings
    group.share_size(settings.gradient_accumulation_steps)
    path = _comparisons(settings, out, overwrite) if group.rank == 0 else ""
    return dataclasses.replace(settings, data=(group.texts(str(path))[0],))


def _comparisons(settings: reward.Settings, out: Path, overwrite: bool) -> Path:
    runs.check_folder(out, overwrite, needed=(settings.init_from,))
    if len(settings.data) > 1:
        raise UserError(f"{', '.join(settings.data)}: name one world, or only files")
    model, tok = checkpoint.load(settings.init_from)
    instructions.check_tuned(tok, settings.init_from)
    world = corpus.world_of(settings.data[0])
    say("Asking the model, and simulated people ...")
    count, people = settings.comparisons, reward.taught_by(world)
    comparisons = reward.collect(model, tok, world, people, count, settings.error, settings.train.seed)
    out.mkdir(parents=True, exist_ok=True)
    # The content is in the name: an older run in this folder keeps its own file.
    path = out / f"comparisons-{hashlib.sha256(repr(comparisons).encode()).hexdigest()[:8]}.jsonl"
    reward.write_file(path, comparisons)
    return path


BEFOREHAND = {"reward": _compare}
