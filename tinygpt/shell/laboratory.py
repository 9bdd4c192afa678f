"""The commands of the laboratory: world, story, claims."""

import itertools
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from reprlib import repr as short

import click

from ..core import kernels
from ..core.config import DTYPES
from ..errors import UserError
from ..files.jsonfile import read_object
from ..lab import report, texts
from ..stages.evaluate import gaps
from ..stages.recipes import FULL, QUICK, Recipe
from ..world import World, corpus
from .options import COUNT, COUNT_OR_0, PATH, check_out, lang, out, refuse, written_options
from .progress import clock, command, progress
from .terminal import say


@click.command()
@click.option("--seed", default=1337, type=COUNT_OR_0, help="The same seed, the same bytes.")
@click.option("--permuted", is_flag=True, help="The same people with other facts.")
@click.option("--documents", default=133_000, type=COUNT, help="Documents, beside the repeated word lists.")
@click.option("--vocab-size", default=2048, type=COUNT, help="Vocabulary that counts the tokens.")
@out("world", "world", holds="the files")
def world(seed: int, permuted: bool, documents: int, vocab_size: int, out: Path, overwrite: bool) -> None:
    """Write the synthetic world: invented people, and text and questions about them.

    Shows documents of each kind and their exact entropy. No model has a loss below the entropy.
    """
    check_out(out, corpus.MARK, "world", overwrite)
    text = corpus.draw(World(seed, permuted), documents=documents)
    corpus.write(out, text)
    tokenizer = corpus.train_tokenizer(text, vocab_size)
    samples: dict[str, list[str]] = {}
    for kind, document in itertools.islice(text.world.documents(), 1000):
        samples.setdefault(kind, []).append(document)
    for kind, examples in samples.items():
        say("\n".join([f"{kind}:", *(f"  {example}" for example in examples[:2]), ""]))
    say("entropy of    documents  nats each  tokens each  nats/token")
    for kind, (n, tokens, floor, *_) in gaps(None, tokenizer, text.world).items():
        say(f"{kind:12} {n:10,} {floor * tokens / n:10.2f} {tokens / n:12.1f} {floor:11.3f}")
    say(f"\nSaved in {out}. Next: {command('pretrain', '--data', str(out))}")


def recipe(usual: Recipe) -> Recipe:
    """The usual recipe, or the Recipe that a program gave the command as its object."""
    return click.get_current_context().obj or usual


@click.command()
@click.option("--seed", default=1337, type=COUNT_OR_0, help="Seed of the world and of all training.")
@click.option("--quick", is_flag=True, help=
              "A third of the time, a fifth of the people: too short for chain of thought and RLHF.")
@click.option("--out", default="story", type=PATH, help="Folder for the models and results.")
@click.option("--no-report", is_flag=True, help="Leave out report.html, which needs matplotlib.")
@click.option("--dtype", default="float32", type=click.Choice(DTYPES),
              help="Number format of the operands of linear maps; weights and sums stay float32.")
@lang
def story(seed: int, quick: bool, out: Path, no_report: bool, dtype: str, language: str) -> None:
    """A GPT's whole life in a small invented world, in three to eight minutes, and what each stage changes.

    The model is pre-trained. It gets examples in the prompt. It is tuned to instructions, then judged and
    steered (RLHF). Then adapters are trained beside the pre-trained model, which stays unchanged. The table
    at the end has numbers of these models. The same command continues after Ctrl-C: pre-training at its last
    update, another stage at its beginning. Then `tinygpt chat --story FOLDER` talks to the models.
    """
    from ..lab import story as telling  # --help does not need the laboratory
    from ..lab.models import Lab

    check_out(out)
    if (out / telling.FILE).exists():
        _check_same(out, read_object(out / telling.FILE), seed, quick, dtype)
    text, stages = partial(texts.text, language), list(telling.STAGES)
    if not quick and kernels.backend().__name__ != kernels.__name__:
        say(text("story without C"))
    say(texts.fill(text("story world"), 100))
    start = time.perf_counter()

    def show(name: str, result: dict | None) -> None:
        if result is None:
            n, at = stages.index(name) + 1, clock(time.perf_counter() - start)
            about = {"n": n, "count": len(stages), "name": [name, {}], "term": [f"{name}, term", {}]}
            say("\n" + text("story heading", **about, time=at))
            say(texts.fill(text(f"{name}, says"), 100))
            return
        if "failed" in result:
            say(text("story failed", error=result["failed"]), err=True)
        names = [texts.wide(text(name)) for name in telling.compared(result)]
        for question, *answers in result.get("samples", ()):
            say(f"\n  > {question}")
            for title, answer in zip(names, answers, strict=True):
                say(texts.narrow(f"  {title + ':':13} ") + texts.spoken(language, answer))
        for note in result.get("notes", ()):
            say(texts.fill(texts.spoken(language, note), 100))

    out.mkdir(parents=True, exist_ok=True)
    try:
        way = recipe(QUICK if quick else FULL).computed_in(dtype)
        story = telling.tell(Lab(out, seed, way, progress=partial(progress, language=language)), show)
    except KeyboardInterrupt:
        say("\n" + text("story stopped"))
        sys.exit(130)
    say(f"\n{report.story(story['stages'], language)}\n")
    say(text("story time", time=clock(time.perf_counter() - start)))
    if quick:
        say(text("story quick"))
    if not no_report:
        _write_page(out / "report.html", story, language)
    say(text("story models", folder=out / story["folder"]))
    words = ["chat", "--story", str(out), "--compare", "base,sft,rlhf"]
    words += ["--lang", language] * (language != texts.LANGUAGES[0])
    say(text("story saved", out=out, command=command(*words)))
    sys.exit(any("failed" in result for result in story["stages"].values()))


def _write_page(path: Path, story: dict, language: str) -> None:
    """Writes the curves of a story, or says how to install what they need."""
    from ..lab import page

    try:
        path.write_text(page.html(story, language), encoding="utf-8")
        say(texts.text(language, "story page", page=path))
    except ImportError:
        install = shlex.join([sys.executable, "-m", "pip", "install", "-e", ".[plots]"])
        say(texts.text(language, "story no page", install=install))


def _check_same(out: Path, there: dict, seed: int, quick: bool, dtype: str) -> None:
    """Raises UserError if the folder has a story of other options."""
    before = there.get("dtype", "float32")
    if (there.get("seed"), there.get("quick"), before) != (seed, quick, dtype):
        which = f"--seed {short(there.get('seed'))}" + " --quick" * bool(there.get("quick"))
        which += f" --dtype {short(before)}" * (before != "float32")
        raise UserError(f"{out}: has the story of {which}; --out takes another folder")


@click.command()
@click.argument("numbers", nargs=-1, type=COUNT, metavar="[NUMBER]...")
@click.option("--seeds", default=2, type=COUNT, help="Number of worlds, from 1337 upwards, each with a base.")
@click.option("--seed", "chosen_seeds", multiple=True, type=COUNT_OR_0, show_default="those of --seeds",
              help="A world; repeat for several.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="All claims, not only the core.")
@click.option("--list", "listed", is_flag=True, help="Print the claims, and stop.")
@click.option("--out", default="claims", type=PATH, help="Folder for the models and results.")
def claims(numbers: tuple, seeds: int, chosen_seeds: tuple, every: bool, listed: bool, out: Path) -> None:
    """Measure the source's claims about pre-training, tuning, adapters and in-context learning.

    NUMBER is the number of a claim. Without a NUMBER, the core of the claims is measured: 40 minutes for two
    seeds. The folder --out keeps worlds, models and numbers. Ctrl-C loses the current measurement, and the
    same command continues. To measure again, remove the folder.
    """
    from ..lab import claims as measuring

    if listed:
        for number, claim in measuring.CLAIMS.items():
            say(f"{number:3}{'  core' if number in measuring.CORE else '':6}  {claim.says}")
        sys.exit()
    check_out(out)
    selection = numbers or (tuple(measuring.CLAIMS) if every else measuring.CORE)
    for number in selection:
        if number not in measuring.CLAIMS:
            every_number = ", ".join(map(str, measuring.CLAIMS))
            raise UserError(f"there is no claim {number}: choose from {every_number}; --list prints them")
    if chosen_seeds:
        refuse(written_options() & {"seeds"}, "--seed names the worlds")
    worlds = dict.fromkeys(chosen_seeds or range(1337, 1337 + seeds))
    try:
        results = measuring.run(out, selection, worlds, say, recipe(FULL))
    except KeyboardInterrupt:
        say("\nStopped. The same command continues.")
        sys.exit(130)
    for number, result in results.items():
        say(f"\n{report.claim(measuring.CLAIMS[number], result)}")
    if results:
        say(f"\nSaved in {out / 'claims.json'}.")
    whole = (max(e.n for e in result.estimates.values()) == len(worlds) for result in results.values())
    sys.exit(not all(whole) or len(results) < len(set(selection)))
