"""The command line: one command per stage. Only this file and the demos parse arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as short

import click
from click.core import ParameterSource

from .. import __version__
from ..errors import UserError
from ..lab import recipes
from .terminal import can_renew, is_terminal, printable, renew, say


class Commands(click.Group):
    """Turns a user's mistake into one line and exit status 2, and a warning into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The story, then the others in the order of a life, which is that of this file."""
        return sorted(self.commands, key=lambda name: name != "story")

    def invoke(self, ctx: click.Context):
        warnings.showwarning = lambda message, *_: say(f"tinygpt: {message}", err=True)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets ? for what it lacks
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `tinygpt generate | head`: click ends quietly
            raise
        except click.ClickException as error:  # click prints it
            error.message = printable(error.message)
            raise
        except KeyboardInterrupt:  # where a command has nothing to save
            say(err=True)
            sys.exit(130)
        except ImportError as error:
            if "failed to map" not in str(error):
                raise
            say("tinygpt: not enough memory to load NumPy", err=True)
            sys.exit(2)
        except RuntimeError as error:
            if "Symlink loop" not in str(error):  # of Path.resolve; from Python 3.13 on an OSError
                raise
            say(f"tinygpt: {_one_line(error)}", err=True)
            sys.exit(2)
        except (UserError, OSError, MemoryError) as error:
            say(f"tinygpt: {_one_line(error)}", err=True)
            sys.exit(2)
        finally:
            if atomic := sys.modules.get("tinygpt.files.atomic"):
                atomic.unlock()


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    advice = "not enough memory: choose smaller sizes. " if isinstance(error, MemoryError) else ""
    return advice + " ".join(text.split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A GPT on one CPU: train it, let it write, talk to it, and check its every gradient."""


# --- what commands share ------------------------------------------------------------------------------------

_PRESETS = ("nano", "small", "baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # those of model.PRESETS
_FINE_TUNING = {"max_iters": 200, "learning_rate": 3e-5, "warmup_iters": 10, "eval_interval": 50}


def _written(options: dict) -> str:
    """{"max_iters": 200} as --max-iters 200."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def _named(kind: click.ParamType, name: str) -> click.ParamType:
    """The name is what --help shows: N instead of INTEGER RANGE."""
    kind.name = name
    return kind


_COUNT, _COUNT_OR_0 = (_named(click.IntRange(least), "n") for least in (1, 0))
_REAL, _RATE = _named(click.FloatRange(0), "x"), _named(click.FloatRange(0, 1, max_open=True), "x")
_SHARE, _MORE_THAN_0 = (_named(click.FloatRange(0, most, min_open=True), "x") for most in (1, None))
_FRACTION = _named(click.FloatRange(0, 1), "x")
_PATH, _FOLDER, _FILE = (_named(click.Path(path_type=Path), name) for name in ("path", "folder", "file"))


def _options(*options: Callable):
    """One decorator from several, in the order in which --help lists them."""
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), options[::-1], command)


def _out(default: str, what: str = "model", holds: str = "the model"):
    return _options(
        click.option("--out", default=default, type=_PATH, help=f"Folder for {holds}."),
        click.option("--overwrite", is_flag=True, help=f"Replace the {what} that is there."),
    )


def _run_folder(out: str, moved: str):
    """The options of a run's folder; `moved`: what --data is for when it is resumed."""
    resume = f"Go on with the run there, with its settings. --data{moved} now."
    return _options(_out(out), click.option("--resume", type=_FOLDER, help=resume))


def _training(*, max_iters, learning_rate, warmup_iters, eval_interval, rate: str | bool = True, **others):
    """The options of `train.TrainConfig`, which all training stages share, with the defaults of a recipe.
    rate: in words, how a command finds its learning rate where that has no default."""
    return _options(
        click.option("--max-iters", default=max_iters, type=_COUNT, help="Updates of weights."),
        click.option("--learning-rate", default=learning_rate, show_default=rate, type=_REAL,
                     help="At its highest."),
        click.option("--min-lr", type=_REAL, show_default="a tenth of it", help="At the end."),
        click.option("--warmup-iters", default=warmup_iters, type=_COUNT_OR_0, help="On the way up."),
        click.option("--weight-decay", default=0.1, type=_REAL, help="Of matrices."),
        click.option("--beta1", default=0.9, type=_RATE, help="Of the mean of gradients."),
        click.option("--beta2", default=0.99, type=_RATE, help="Of the mean of their squares."),
        click.option("--grad-clip", default=1.0, type=_REAL, help="Largest norm; 0: any."),
        click.option("--eval-interval", default=eval_interval, type=_COUNT,
                     help="Updates from one evaluation, and save, to the next."),
        click.option("--seed", default=1337, type=_COUNT_OR_0, help="Of weights, batches and dropout."),
    )  # fmt: skip


_adapter = _options(
    click.option("--adapter", type=click.Choice(("lora", "ptuning", "prompt", "prefix")),
                 help="Train a few weights beside the model, which stays as it is, instead of its own."),
    click.option("--lora-rank", default=8, type=_COUNT, help="Of each low-rank branch."),
    click.option("--lora-alpha", type=_REAL, show_default="the rank", help="A branch counts alpha / rank."),
    click.option("--lora-dropout", default=0.0, type=_RATE, help="On what goes into the branches."),
    click.option("--lora-targets", multiple=True, metavar="NAME", show_default="all",
                 help="Maps with a branch, such as c_attn or h.0.mlp.c_proj; repeat."),
    click.option("--num-virtual-tokens", default=20, type=_COUNT, help="Length of a learned prompt."),
    click.option("--encoder-hidden", type=_COUNT_OR_0, show_default="ptuning: --n-embd; prefix: 0",
                 help="Channels of the MLP that makes the prompt; 0: none."),
    click.option("--prompt-init", default="vocab", type=click.Choice(("vocab", "random")),
                 help="What a prompt without an MLP begins as."),
)  # fmt: skip
_OF_LORA = {f"lora_{field}": field for field in ("rank", "alpha", "dropout", "targets")}
_OF_PROMPT = {"num_virtual_tokens": "num_virtual_tokens", "encoder_hidden": "hidden", "prompt_init": "init"}


def _adapter_config(options: dict, n_embd: int):
    """What the options of `_adapter` say; None: no adapter."""
    from ..core.config import PROJECTIONS
    from ..stages.adapter import AdapterConfig

    kind, names = options["adapter"] or "", _OF_LORA | _OF_PROMPT
    unused = {"": names, "lora": _OF_PROMPT}.get(kind, _OF_LORA)
    reason = f"--adapter {kind} has no such setting" if kind else "without --adapter nothing has that setting"
    _refuse(_given() & unused.keys(), reason)
    values = {field: options[name] for name, field in names.items()}
    if not kind:
        return None
    if values["alpha"] is None:
        values["alpha"] = float(values["rank"])
    if values["hidden"] is None:
        values["hidden"] = n_embd if kind == "ptuning" else 0
    return AdapterConfig(kind, **values | {"targets": values["targets"] or PROJECTIONS})


def _room(model, adapter) -> int:
    """The positions of a model that an adapter leaves to the text."""
    return model.block_size - (adapter.prompt_length if adapter else 0)


def _fields(cls: type, options: dict) -> dict:
    """What the options say of a dataclass's fields, by their names."""
    return {name: options[name] for name in cls.__dataclass_fields__ if options.get(name) is not None}


def _settings(stage, options: dict, **own):
    """The Settings of a stage's run: `own`, and what the options of their names say."""
    from ..core.train import TrainConfig

    how = {"min_lr": options["learning_rate"] / 10} | _fields(TrainConfig, options)
    return stage.Settings(**_fields(stage.Settings, options) | {"train": TrainConfig(**how)} | own)


def _given() -> set[str]:
    """The names of the options that the user wrote."""
    ctx = click.get_current_context()
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _refuse(names: set[str], reason: str) -> None:
    if names:
        written = ", ".join("--" + name.replace("_", "-") for name in sorted(names))
        raise click.UsageError(f"{reason}: leave out {written}")


def _resume(stage, options: dict, needs: str = "", moved: tuple[str, ...] = ("data",)):
    """The run that --resume names, or None where one is to begin, which says `needs` if --init-from or --data
    is missing. moved: the options that say where a run's data is now."""
    if options["resume"]:
        from ..folders import runs

        _refuse(_given() - {"resume", *moved}, "--resume takes all settings from its folder")
        return runs.resume(stage, options["resume"], **{name: options[name] for name in moved})
    if needs and not (options["init_from"] and options["data"]):
        raise click.UsageError(needs)
    return None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


_WATCHED = ("reward", "gold", "kl", "entropy", "distinct", "val_right", "val_right_known", "val_false_never")


def _progress(max_iters: int) -> Callable[[dict], None]:
    """A report for `train.train`: on a terminal a line that renews itself, else a line now and then."""
    renews, every = can_renew(), max(1, max_iters // 20)
    first, began, shown = None, time.perf_counter(), 0.0

    def report(record: dict) -> None:
        nonlocal first, shown
        n, now = record["iter"], time.perf_counter()
        first = n - 1 if first is None else first
        left = _clock((now - began) / (n - first) * (max_iters - n))
        val = f"  val loss {record['val_loss']:.4f}" if "val_loss" in record else ""
        watched = (name for name in _WATCHED if name in record)
        watched = "".join(f"  {name.replace('_', ' ')} {record[name]:.3f}" for name in watched)
        val += f" (floor {record['val_floor']:.4f})" if "val_floor" in record else ""
        loss = f"  loss {record['train_loss']:.4f}" * ("reward" not in record)  # RLHF's is near 0 always
        text = f"{n:{len(str(max_iters))}}/{max_iters}{loss}{watched}{val}"
        text += f"  {record['tokens_per_s']:,.0f} tokens/s  {left} left"
        if not renews:
            if val or n % every == 0:
                say(text)
        elif val or n == max_iters:
            renew(text, nl=True)
        elif now - shown > 0.1:
            shown, done = now, 20 * n // max_iters
            renew(text, before=f"[{'#' * done}{'-' * (20 - done)}] ")

    return report


def _names_world(options: dict, base: Path | None = None) -> bool:
    """Whether --data names a world. `world` becomes the world that a base was trained on, or the folder of
    that name, or the world of --seed."""
    from ..world.corpus import is_source

    if "world" in options["data"] + options.get("val_data", ()) + options.get("ptx_data", ()):
        usual = "world" if Path("world").exists() else f"world:{options['seed']}"
        known = (_world_of(base) if base else None) or usual
        for name in options.keys() & {"data", "val_data", "ptx_data"}:
            options[name] = tuple(known if path == "world" else path for path in options[name])
    return any(map(is_source, options["data"]))


def _world_of(folder: Path, wanted: str = "") -> str | None:
    """The world that a model was trained on, or None. wanted: what to ask the user for instead of None."""
    from ..folders import checkpoint
    from ..lab import story
    from ..stages import rlhf, sft
    from ..stages.pretrain import Settings
    from ..world.corpus import is_source

    source, before, seen = None, folder, set()
    while before and source is None and (at := Path(before).resolve()) not in seen:
        seen.add(at)  # a model that was tuned on files has a base, which may be itself as it was before
        sources, before = (), ""
        for cls in (Settings, sft.Settings, rlhf.Settings):
            with contextlib.suppress(UserError):
                settings, _ = checkpoint.read_run(at, cls)
                sources, before = settings.data, settings.init_from
        source = next(filter(is_source, sources), None) or story.world_of(at)
    if wanted and source is None:
        raise UserError(f"{folder}: was trained on no world: give {wanted} as --data FILE")
    return source


def _train(run, data: str) -> None:
    """Says what is trained, and on which data, and runs a stage to its end, or until Ctrl-C."""
    from ..folders import runs

    stage, settings, model = run.stage, run.stage.settings, run.stage.model
    total, trained = model.flat.size, model.trained.flat.size
    beside = f", {trained:,} trained ({trained / total:.2%})" if model.trained is not model else ""
    say(f"{total:,} weights{beside}{data}")
    if stage.optimizer.steps >= settings.train.max_iters:
        say(f"All {stage.optimizer.steps} updates of this run are made.")
        if settings.stage in ("pretrain", "sft") and settings.has_model:
            more = _command(settings.stage, "--init-from", str(run.folder), "--data", "...", "--out", "more")
            say(f"To train on: {more}")
    try:
        stage.train(**runs.saving(run, _progress(settings.train.max_iters)))
    except KeyboardInterrupt:
        say(f"\nStopped. To go on: {_command(settings.stage, '--resume', str(run.folder))}")
        sys.exit(130)


def _command(*words: str) -> str:
    """A command to type next: by the path it was called with, where the shell would not find it by name."""
    called = Path(sys.argv[0])
    unknown = called.name == "tinygpt" and not shutil.which("tinygpt")
    return shlex.join([str(called) if unknown else "tinygpt", *words])


def _saved(run, command: str) -> None:
    """Says where a run is, and how to take up what it has trained."""
    settings = run.stage.settings
    base = [] if settings.has_model else [settings.init_from, "--adapter-folder"]
    say(f"\nSaved in {run.folder}. Next: {_command(command, *base, str(run.folder))}")


def _check_out(out: Path, name: str = "", what: str = "", overwrite: bool = False) -> None:
    """Refuses a file, and without --overwrite a folder that has a file of that name."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out names a folder")
    if name and (out / name).exists() and not overwrite:
        raise UserError(f"{out}: has a {what}; --overwrite replaces it, --out names another folder")


# --- training: pretrain, world, sft, label, reward, rlhf, merge ---------------------------------------------


@main.command()
@click.option("--data", multiple=True, metavar="PATH", show_default="Python's own documentation",
              help="A UTF-8 text file, or a folder of .txt, .md and .rst files; repeat for several. "
                   "world: the synthetic world that --seed makes, or the folder that tinygpt world wrote. "
                   f"Defaults then: {_written(recipes.PRETRAIN)}.")  # fmt: skip
@click.option("--tokenizer", default="char", metavar="char|bpe|FOLDER", help="What text is cut into.")
@click.option("--vocab-size", default=1024, type=_COUNT, help="With --tokenizer bpe.")
@_run_folder("out", moved=" says where the text is")
@click.option("--init-from", type=_FOLDER,
              help="Begin with the model there, tinygpt's or GPT-2's, and its tokenizer. Defaults "
                   f"then: --block-size 64 {_written(_FINE_TUNING)}.")  # fmt: skip
@click.option("--preset", default="nano", type=click.Choice(_PRESETS), metavar="NAME",
              help=f"Sizes, which the next four change: {', '.join(_PRESETS)}.")  # fmt: skip
@click.option("--n-layer", type=_COUNT, show_default="nano: 4", help="Blocks.")
@click.option("--n-head", type=_COUNT, show_default="nano: 4", help="Heads; divides --n-embd.")
@click.option("--n-embd", type=_COUNT, show_default="nano: 128", help="Channels.")
@click.option("--block-size", type=_COUNT, show_default="nano: 64", help="Tokens of context.")
@click.option("--post-norm", is_flag=True, help="GPT-1's blocks instead of GPT-2's.")
@click.option("--dropout", default=0.0, type=_RATE, help="Helps where there is little text.")
@click.option("--batch-size", default=12, type=_COUNT, help="Sequences at a time.")
@click.option("--gradient-accumulation-steps", default=1, type=_COUNT, help="Batches an update.")
@_adapter
@click.option("--merge-every", default=0, type=_COUNT_OR_0,
              help="Updates after which LoRA's branches join the weights and begin anew; "
                   "0: never.")  # fmt: skip
@_training(max_iters=4000, learning_rate=1e-3, warmup_iters=100, eval_interval=1000)
def pretrain(**options) -> None:
    """Train a model to predict the next token of a text.

    Without options: a small model, one character at a time, on Python's own documentation, in about two
    minutes. The last tenth of the text is not trained on; val loss is the mean over it, or over a million
    tokens from all places of it. Ctrl-C saves, --resume goes on. With --adapter lora and no --init-from the
    model begins at random, and what has no branch (embeddings, norms, biases) is trained as it is; its folder
    has the whole model.
    """
    import numpy as np

    from ..lab import report
    from ..stages import evaluate
    from ..stages.pretrain import Pretrain
    from ..text.stream import stream

    run = _resume(Pretrain, options) or _begin(Pretrain, **options)
    stage = run.stage
    model, world = stage.model, stage.world
    parts = stage.train_tokens, stage.val_tokens
    n, n_val = (part.size if world is None else int(part.weights.sum()) for part in parts)
    kinds = f"{model.config.vocab_size:,} kinds of token"
    _train(run, f", {kinds}; {n:,} tokens to train on, {n_val:,} to evaluate on")
    if world is None:  # a sample, which goes on from the first of the validation tokens
        rng, start = np.random.default_rng(0), stage.val_tokens[:1].tolist()
        text = "".join(stream(model, stage.tokenizer, start, 300, temperature=0.8, rng=rng))
        say(f"\nA sample:\n{text.strip()}")
    else:  # loss above the floor by kind of document, and recall by how often a fact was told
        say(f"\n{report.gaps(evaluate.gaps(model, stage.tokenizer, world))}")
        recalled = evaluate.recall_by_exposure(model, stage.tokenizer, world, stage.documents)
        say(f"\n{report.recall(recalled, evaluate.chance(world))}")
    _saved(run, "generate")


def _begin(stage, *, preset, init_from, out, overwrite, **options):
    from ..core.config import PRESETS, GPTConfig
    from ..folders import runs
    from ..folders.checkpoint import read_config
    from ..stages.adapter import LEARNING_RATES

    given = _given()
    if not options["data"]:
        say("Reading Python's own documentation ...")
    elif _names_world(options):
        if not init_from:
            options |= {name: v for name, v in recipes.PRETRAIN.items() if name not in given}
        say(f"Reading {options['data'][0]} ...")
    vocab_size = options.pop("vocab_size")  # of the tokenizer: the model's may be another
    if options["tokenizer"] != "bpe":
        _refuse(given & {"vocab_size"}, "only --tokenizer bpe is trained to a size")
    if init_from:
        fixed = {"preset", "n_layer", "n_head", "n_embd", "post_norm", "tokenizer"}
        _refuse(given & fixed, "--init-from takes the model and its tokenizer as they are")
        model = dataclasses.replace(read_config(init_from), dropout=options["dropout"])
        options |= {name: value for name, value in _FINE_TUNING.items() if name not in given}
    else:
        model = dataclasses.replace(PRESETS[preset], **_fields(GPTConfig, options))
    adapter = _adapter_config(options, model.n_embd)
    if adapter and not init_from:
        if adapter.kind != "lora":
            raise click.UsageError(f"--adapter {adapter.kind} needs a trained model: give it as --init-from")
        adapter = dataclasses.replace(adapter, full=True)
    elif adapter and "learning_rate" not in given:
        options["learning_rate"] = LEARNING_RATES[adapter.kind]
    room = max(1, _room(model, adapter))
    options["block_size"] = options["block_size"] or min(room, 64 if init_from else room)
    own = {"vocab_size": vocab_size, "init_from": str(init_from or "")}
    settings = _settings(stage, options, model=model, adapter=adapter, **own)
    return runs.begin(stage, out, settings, overwrite)


@main.command()
@click.option("--seed", default=1337, type=_COUNT_OR_0, help="The same seed, the same bytes.")
@click.option("--permuted", is_flag=True, help="The same people with other answers.")
@click.option("--documents", default=133_000, type=_COUNT, help="In the corpus, beside the refrains.")
@click.option("--vocab-size", default=2048, type=_COUNT, help="To count tokens with.")
@_out("world", "world", holds="the files")
def world(seed: int, permuted: bool, documents: int, vocab_size: int, out: Path, overwrite: bool) -> None:
    """Write the synthetic world: invented people, and text and questions about them.

    Shows documents of each kind and their exact entropy: the loss that no model passes.
    """
    from ..stages.evaluate import gaps
    from ..world import World, corpus

    _check_out(out, corpus.MARK, "world", overwrite)
    found = corpus.draw(World(seed, permuted), documents=documents)
    corpus.write(out, found)
    tokenizer = corpus.train_tokenizer(found, vocab_size)
    samples: dict[str, list[str]] = {}
    for kind, document in itertools.islice(found.world.documents(), 1000):
        samples.setdefault(kind, []).append(document)
    for kind, texts in samples.items():
        say("\n".join([f"{kind}:", *(f"  {text}" for text in texts[:2]), ""]))
    say("entropy of    documents  nats each  tokens each  nats/token")
    for kind, (n, tokens, floor, *_) in gaps(None, tokenizer, found.world).items():
        say(f"{kind:12} {n:10,} {floor * tokens / n:10.2f} {tokens / n:12.1f} {floor:11.3f}")
    say(f"\nSaved in {out}. Next: {_command('pretrain', '--data', str(out))}")


@main.command()
@click.option("--init-from", type=_FOLDER,
              help="The model to tune, tinygpt's or GPT-2's; its tokenizer has an end-of-text "
                   "token.")  # fmt: skip
@click.option("--data", multiple=True, metavar="FILE",
              help='JSON Lines: {"prompt": "...", "completion": "..."} or {"messages": [...]}; repeat. '
                   "world: what the base's world, or the folder of tinygpt world, has for tuning. "
                   f"Defaults then: {_written(recipes.SFT)}.")  # fmt: skip
@click.option("--val-data", multiple=True, metavar="FILE", show_default="a tenth of --data",
              help="The same, to evaluate on.")  # fmt: skip
@_run_folder("sft", moved=" says where the examples are")
@click.option("--show", type=_COUNT, help="Print so many examples, token by token, and stop.")
@click.option("--no-packing", is_flag=True, help="A row for each example, instead of several to a row.")
@click.option("--block-size", type=_COUNT, show_default="256, or the model's if less",
              help="Tokens of a row; longer examples are left out.")  # fmt: skip
@click.option("--batch-size", default=8, type=_COUNT, help="Rows at a time.")
@click.option("--gradient-accumulation-steps", default=1, type=_COUNT, help="Batches an update.")
@click.option("--dropout", default=0.0, type=_RATE, help="Helps where there are few examples.")
@click.option("--adapter-folder", type=_FOLDER,
              help="Begin with the adapter there, and train it on; instead of --adapter.")  # fmt: skip
@_adapter
@_training(max_iters=200, learning_rate=None, warmup_iters=10, eval_interval=50,
           rate="5e-4 at a million weights, less by the root of their number; an adapter's")  # fmt: skip
def sft(**options) -> None:
    """Tune a model to follow instructions: train it on prompts and their completions.

    The loss is that of the completions and of the end-of-text token after each. Ctrl-C saves, --resume goes
    on. `tinygpt chat` talks with the result.
    """
    from ..core.train import weight_change
    from ..stages.answers import answers
    from ..stages.prompts import nearest
    from ..stages.sft import SFT

    is_world = _names_world(options, options["resume"] or options["init_from"])
    needs = "give the model to tune as --init-from and the examples as --data"
    run = _resume(SFT, options, needs, ("data", "val_data"))
    if run is None and options["show"]:
        _show(options["init_from"], options["data"], options["show"])
        sys.exit()
    run = run or _begin_sft(SFT, is_world, **options)
    stage, settings = run.stage, run.stage.settings
    rows, questions, tokenizer = stage.rows, stage.questions, stage.tokenizer
    block_size, learned = settings.block_size, int(rows.weights.sum())
    data = f"; {stage.count:,} examples in {len(rows.ids):,} rows of {block_size}, {learned:,} tokens of "
    data += f"them learned; {len(questions):,} examples to evaluate on"
    if stage.dropped:
        data += f"\nLeft out, as longer than --block-size {block_size}: {stage.dropped:,}"
    _train(run, data)
    model, asked = stage.model, [example.messages for example in questions[:3]]
    if stage.before is not None:
        say(f"\nThe weights moved by {weight_change(stage.before, model.params)[0]:.1%} of their norm.")
    if settings.adapter and settings.adapter.kind in ("ptuning", "prompt"):
        say("\nThe rows of the learned prompt, and the tokens that are nearest to each:")
        for i, ids in enumerate(nearest(model).tolist()):
            shown = "  ".join(_shown(tokenizer.tokens[i]) for i in ids if i < tokenizer.vocab_size)
            say(f"  {i:3}  {shown}")
    _show_tasks(stage)
    found = answers(model, tokenizer, [messages[:-1] for messages in asked], 100)
    for (*before, expected), answer in zip(asked, found, strict=True):
        question = before[-1]["content"].strip() if before else ""
        say(f"\n> {question}\n{answer.text}{'' if answer.stopped else ' ...'}")
        say(f"  (in the data: {expected['content'].strip()})")
    _saved(run, "chat")


def _begin_sft(stage, is_world: bool, *, init_from, adapter_folder, out, overwrite, **options):
    from ..folders import adapters, runs
    from ..folders.checkpoint import read_config
    from ..stages.sft import learning_rate

    given = _given()
    if is_world:
        options["val_data"] = options["val_data"] or options["data"]
        adapted = {"learning_rate"} if given & {"adapter", "adapter_folder"} else set()  # has its own
        options |= {name: v for name, v in recipes.SFT.items() if name not in given | adapted}
    model = dataclasses.replace(read_config(init_from), dropout=options["dropout"])
    adapter = _adapter_config(options, model.n_embd)
    if adapter_folder:
        _refuse(given & {"adapter"}, "--adapter-folder has an adapter")
        adapter = adapters.load_model(init_from, adapter_folder)[0].adapter.config
    room = max(1, _room(model, adapter))
    options["block_size"] = options["block_size"] or min(256, room)
    if options["learning_rate"] is None:
        options["learning_rate"] = learning_rate(model, adapter.kind if adapter else "")
    own = {"packing": not options["no_packing"], "init_from": str(init_from)}
    own["adapter_folder"] = str(adapter_folder or "")
    return runs.begin(stage, out, _settings(stage, options, model=model, adapter=adapter, **own), overwrite)


def _show(init_from: Path, data: tuple[str, ...], count: int) -> None:
    """The first examples as they are trained on: each token, and whether it is learned."""
    from ..stages.sft import read_examples
    from ..text import instructions, tokenizer

    found = tokenizer.load(init_from)
    for where, messages in read_examples(data)[:count]:
        ids, learned = instructions.encode(found, messages)
        say(f"{where}: {len(ids)} tokens, {learned.sum()} learned")
        for i, is_learned in zip(ids.tolist(), learned.tolist(), strict=True):
            say(f"  {'learned' if is_learned else '-':8}{i:6}  {_shown(found.tokens[i])}")


def _show_tasks(stage) -> None:
    """How well a model that was tuned on a world does its tasks, on people and problems of no tuning set."""
    from ..lab import report
    from ..stages import evaluate
    from ..world import corpus

    for source in filter(corpus.is_source, stage.settings.data):
        found = evaluate.task_scores(stage.model, stage.tokenizer, corpus.world_of(source))
        say(f"\n{report.scores(found)}")


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--data", metavar="FILE", show_default="the world that the model was trained on",
              help='JSON Lines: {"prompt": "..."}; or a folder of tinygpt world, or world:SEED.')  # fmt: skip
@click.option("--out", default="comparisons.jsonl", type=_PATH, help="The file.")
@click.option("--max-new-tokens", default=16, type=_COUNT, help="Of an answer.")
@click.option("--seed", default=1337, type=_COUNT_OR_0, help="Of prompts and answers.")
def label(folder: Path, data: str, out: Path, max_new_tokens: int, seed: int) -> None:
    """Compare two answers of the tuned model in FOLDER, again and again: what tinygpt reward learns from.

    One key each: 1 or 2 for the better one, s to skip, q to stop. Each comparison is in the file at once; the
    same command goes on after the last one.
    """
    import numpy as np

    from ..folders import checkpoint
    from ..stages import reward as judging
    from ..stages.rlhf import read_prompts
    from ..stages.samples import sample
    from ..text import instructions
    from ..world import corpus

    model, tokenizer = checkpoint.load(folder)
    instructions.check_tuned(tokenizer, folder)
    data = data or _world_of(folder, "prompts")
    before = judging.read_file(out) if out.exists() else []
    done, known = len(before), {(c.prompt, frozenset((c.chosen, c.rejected))) for c in before}
    items = read_prompts(data)
    prompts = [item["prompt"] for item in items]
    order = np.random.default_rng(seed).permutation(len(prompts))
    keys, in_world = "1 or 2: the better one; s: skip; q: stop", corpus.is_source(data)
    say(keys)
    asked = done
    for n in itertools.count(done):
        if n - asked > len(prompts):  # to each it says one thing, or what was compared before
            say("There is nothing left to compare: another --seed or other prompts may give more.")
            break
        prompt, rng = prompts[order[n % len(prompts)]], np.random.default_rng([seed, n])
        ids = instructions.prompt(tokenizer, prompt)
        drawn = sample(model, tokenizer, [ids], 8, max_new_tokens, rng).answers
        pair = list(dict.fromkeys([*filter(None, drawn), "I do not know."]))[:2]
        if len(pair) < 2 or (prompt, frozenset(pair)) in known:
            continue
        known.add((prompt, frozenset(pair)))
        asked = n
        say(f"\n{done + 1}. {prompt}\n  1  {pair[0]}\n  2  {pair[1]}")
        if in_world:
            meta = items[order[n % len(prompts)]]["meta"]
            told = "" if meta["exposure"] else " But no text told the model."
            say(f"     (true: {meta['answer']}.{told})")
        key = ""
        while key not in ("1", "2", "s", "q"):
            if key.strip():
                say(f"     {keys}")
            key = _key()
        if key == "q":
            break
        if key != "s":
            chosen, rejected = pair if key == "1" else pair[::-1]
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done += 1
    say(f"{done} comparisons in {out}." + " Next, a judge or without one:" * bool(done))
    for words in (["reward"], ["rlhf", "--algo", "dpo"]) if done else ():
        say("  " + _command(*words, "--init-from", str(folder), "--data", str(out)))


def _key() -> str:
    """The next key, or "q" where there is none."""
    try:
        keys = click.getchar() if is_terminal(sys.stdin) else _from_stdin(lambda: sys.stdin.read(1))
        return keys[:1] or "q"
    except (EOFError, KeyboardInterrupt):
        return "q"


@main.command()
@click.option("--init-from", type=_FOLDER,
              help="The model that becomes the judge: one that was tuned to instructions.")  # fmt: skip
@click.option("--data", multiple=True, metavar="FILE",
              help='JSON Lines: {"prompt": "...", "chosen": "...", "rejected": "..."}; repeat. world: what '
                   "simulated people prefer of the model's own answers, in the world that "
                   "it knows.")  # fmt: skip
@click.option("--comparisons", default=recipes.REWARD["comparisons"], type=_COUNT,
              help="Of simulated people.")  # fmt: skip
@click.option("--error", default=0.1, type=_RATE, help="The rate of their slips.")
@_run_folder("reward", moved=": where the file is")
@click.option("--block-size", default=128, type=_COUNT, help="Tokens of a row, with several texts.")
@click.option("--batch-size", default=recipes.REWARD["batch_size"], type=_COUNT,
              help="Comparisons at a time.")  # fmt: skip
@click.option("--dropout", default=0.0, type=_RATE, help="Helps where there are few.")
@_training(**recipes.REWARD)
def reward(**options) -> None:
    """Train a judge of answers on comparisons: which of two answers people preferred.

    It is the model with one number as its result; before an answer it reads what the model itself answers, so
    keep that: the folder of --init-from. val right is how often the better answer has the higher
    score, for a tenth of the prompts, which are not trained on; in a world they may ask in other words for a
    fact that is. Ctrl-C saves, --resume goes on.
    """
    from ..stages import reward as judging
    from ..world import corpus

    needs = "give the model as --init-from and the comparisons as --data"
    run = _resume(judging.Reward, options, needs) or _begin_reward(judging, **options)
    stage = run.stage
    settings, val, judge = stage.settings, stage.comparisons.val, stage.judge
    _train(run, f"; {len(stage.comparisons.train):,} comparisons, {len(val):,} to evaluate on")
    found = judging.judged(judge, val)
    in_world = any(found.by_kind)
    say(f"\nThe preferred answer has the higher score: {found.right}.")
    if in_world:
        say(f"That is by what is true; the labels go by it in {found.labels_right:.1%} of these.")
    say(f"By {found.margin:.2f} in the mean; its certainty is off by {found.calibration:.1%}.")
    source = _world_of(Path(settings.init_from)) if in_world else None
    if source:
        world = corpus.world_of(source)
        people = world.people("known", "eval") + world.people("never", "eval")
        pairs = judging.collect(judge.author, judge.tokenizer, world, people, 2000, error=0)
        others = judging.judged(judge, pairs)
        say(f"About people of whom no comparison was: {others.right}.")
        for kind, rate in others.by_kind.items():
            say(f"  {kind}: {rate}")
    words = ["--init-from", settings.init_from, "--reward-model", str(run.folder), "--data"]
    say(f"\nSaved in {run.folder}. Next: {_command('rlhf', *words, 'world' if source else 'FILE')}")


def _begin_reward(judging, *, init_from, data, comparisons, error, out, overwrite, **options):
    from ..folders import checkpoint, runs
    from ..text import instructions
    from ..world import corpus

    runs.check_folder(out, overwrite, needed=(init_from,))
    config = dataclasses.replace(checkpoint.read_config(init_from), dropout=options["dropout"])
    if data == ("world",):
        data = (_world_of(init_from, "" if Path("world").exists() else "comparisons") or "world",)
    own = {"model": config, "data": data, "init_from": str(init_from)}
    settings = _settings(judging, options, **own)
    if any(map(corpus.is_source, data)):
        if len(data) > 1:
            raise UserError(f"{', '.join(data)}: name one world, or only files")
        model, tokenizer = checkpoint.load(init_from)
        instructions.check_tuned(tokenizer, init_from)
        world = corpus.world_of(data[0])
        say("Asking the model, and simulated people ...")
        people = judging.taught_by(world)
        found = judging.collect(model, tokenizer, world, people, comparisons, error, options["seed"])
        out.mkdir(parents=True, exist_ok=True)  # a name of its own: an older run there needs its own file
        path = out / f"comparisons-{hashlib.sha256(repr(found).encode()).hexdigest()[:8]}.jsonl"
        judging.write_file(path, found)
        settings = dataclasses.replace(settings, data=(str(path),))
    return runs.begin(judging.Reward, out, settings, overwrite)


@main.command()
@click.option("--init-from", type=_FOLDER,
              help="The model to steer, from tinygpt sft; it stays as it is, as the reference.")  # fmt: skip
@click.option("--reward-model", type=_FOLDER, help="The judge, from tinygpt reward; dpo has none.")
@click.option("--data", multiple=True, metavar="FILE",
              help='JSON Lines: {"prompt": "..."}, for dpo {"prompt", "chosen", "rejected"}; repeat. '
                   "world: questions about people of the base's world.")  # fmt: skip
@click.option("--algo", default="rloo", type=click.Choice(("reinforce", "rloo", "ppo", "grpo", "dpo")))
@click.option("--beta", default=recipes.RLHF["beta"], type=_REAL,
              help="What a nat of KL to the reference costs.")  # fmt: skip
@click.option("--num-prompts", default=16, type=_COUNT, help="Of an update.")
@click.option("--num-generations", default=8, type=_COUNT, help="Answers to each.")
@click.option("--max-new-tokens", default=16, type=_COUNT, help="Of an answer.")
@click.option("--num-iterations", default=1, type=_COUNT, help="Updates from the same answers.")
@click.option("--cliprange", default=0.2, type=_REAL, help="Of the ratio of new to old probabilities.")
@click.option("--cliprange-value", default=0.2, type=_REAL, help="ppo: of the values.")
@click.option("--vf-coef", default=0.1, type=_REAL, help="ppo: weight of the values' loss.")
@click.option("--gamma", default=1.0, type=_FRACTION, help="ppo: what later rewards count.")
@click.option("--lam", default=0.95, type=_FRACTION, help="ppo: of GAE.")
@click.option("--ptx-coef", default=recipes.RLHF["ptx_coef"], type=_REAL, show_default=
              f"{recipes.RLHF['ptx_coef']} with --data world, else 0",
              help="Weight of the loss of the tuning's examples, learned beside.")  # fmt: skip
@click.option("--ptx-data", multiple=True, metavar="FILE", show_default="the world of --data",
              help="These examples: as tinygpt sft takes them; repeat.")  # fmt: skip
@click.option("--batch-size", default=32, type=_COUNT, help="dpo: comparisons of an update.")
@_run_folder("rlhf", moved=": where the file is")
@_adapter
@_training(**recipes.RLHF)
def rlhf(**options) -> None:
    """Steer a tuned model by a judge of its answers: sample, score, make what scored well likelier.

    Shows the reward, in a world also what people would truly feel (gold), the exact KL to the reference, the
    entropy, and how many answers differ. Ctrl-C saves, --resume goes on.
    """
    import numpy as np

    from ..stages.rlhf import RLHF
    from ..stages.samples import sample
    from ..text import instructions

    _names_world(options, options["resume"] or options["init_from"])
    needs = "give the model as --init-from and the prompts as --data"
    run = _resume(RLHF, options, needs) or _begin_rlhf(RLHF, **options)
    stage = run.stage
    rows = stage.data.prompts or [comparison._asdict() for comparison in stage.data.comparisons]
    _train(run, f"; {len(rows):,} prompts")
    asked = [instructions.prompt(stage.tokenizer, row["prompt"]) for row in rows[:3]]
    found = sample(stage.model, stage.tokenizer, asked, 2, 24, np.random.default_rng(0))
    for n, row in enumerate(rows[:3]):
        say(f"\n> {row['prompt']}\n" + "\n".join(found.answers[2 * n : 2 * n + 2]))
    _show_tasks(stage)
    _saved(run, "chat")


def _begin_rlhf(stage, *, init_from, reward_model, out, overwrite, **options):
    from ..folders import runs
    from ..folders.checkpoint import read_config
    from ..stages.rlhf import Config
    from ..world.corpus import is_source

    if options["algo"] != "dpo" and not reward_model:
        raise click.UsageError("give the judge as --reward-model")
    if options["algo"] == "dpo":
        _refuse(_given() & {"reward_model"}, "dpo learns from comparisons")
    if options["algo"] != "ppo":
        _refuse(_given() & {"cliprange_value", "vf_coef", "gamma", "lam"}, "only ppo has that setting")
    model = read_config(init_from)
    adapter = _adapter_config(options, model.n_embd)
    if options["algo"] == "dpo":
        _refuse(_given() & {"ptx_coef", "ptx_data"}, "dpo learns from comparisons alone")
    options["ptx_data"] = options["ptx_data"] or tuple(filter(is_source, options["data"]))
    if not options["ptx_data"]:
        _refuse(_given() & {"ptx_coef"}, "give the examples as --ptx-data")
        options["ptx_coef"] = 0.0
    settings = _settings(
        stage, options, model=model, adapter=adapter, block_size=_room(model, adapter),
        rl=Config(**_fields(Config, options)), reward_from=str(reward_model or ""), init_from=str(init_from),
    )  # fmt: skip
    return runs.begin(stage.of(settings), out, settings, overwrite)


_adapter_folder = click.option(
    "--adapter-folder", type=_FOLDER, help="An adapter that was trained beside this model."
)


@main.command()
@click.argument("folder", type=_FOLDER)
@_adapter_folder
@_out("merged")
def merge(folder: Path, adapter_folder: Path | None, out: Path, overwrite: bool) -> None:
    """Add a LoRA adapter to the weights of the model in FOLDER: a plain model, as fast as that one."""
    from ..folders import adapters, runs
    from ..stages import variants

    if adapter_folder is None:
        raise click.UsageError("say which adapter, as --adapter-folder")
    runs.check_folder(out, overwrite, needed=(folder, adapter_folder))
    model, tokenizer = adapters.load_model(folder, adapter_folder)
    runs.save_model(out, variants.merge(model), tokenizer)
    say(f"Saved in {out}. Next: {_command('generate', str(out))}")


# --- a trained model: generate, chat, fewshot; tokenizer ----------------------------------------------------


def _sampling(stop: str | None, shown: str, required: bool = True):
    """The arguments that generate and chat share."""
    return _options(
        click.argument("folder", type=_FOLDER, required=required),
        _adapter_folder,
        click.option("--max-new-tokens", default=200, type=_COUNT_OR_0, help="The length."),
        click.option("--temperature", default=0.8, type=_REAL, help="0: greedy."),
        click.option("--top-k", default=0, type=_COUNT_OR_0, help="Only the K likeliest; 0: all."),
        click.option("--top-p", default=1.0, type=_SHARE,
                     help="Only the likeliest tokens that have this probability together; 1: all."),
        click.option("--stop", default=stop, show_default=shown, metavar="TEXT", help="End before this."),
        click.option("--seed", default=1337, type=_COUNT_OR_0, help="The same seed, the same text."),
    )  # fmt: skip


def _speaker(folder: Path, adapter_folder: Path | None, seed: int, **sampling):
    """The model, the tokenizer, and a function from ids and a text to their continuation up to that text."""
    import numpy as np

    from ..folders.adapters import load_model
    from ..text.stream import stream, until

    model, tokenizer = load_model(folder, adapter_folder)
    sampling["rng"] = np.random.default_rng(seed)
    return model, tokenizer, lambda ids, stop: until(stream(model, tokenizer, ids, **sampling), stop)


def _from_stdin(read: Callable[[], str]) -> str:
    if sys.stdin is None:  # `<&-` in a shell
        raise UserError("standard input is closed: there is no text to read")
    try:
        return read()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


@main.command()
@_sampling(stop="", shown="none")
@click.option("--prompt", default="", help="The text to go on from; - reads standard input.")
@click.option("--num-samples", default=1, type=_COUNT, help="How many, a line of dashes between.")
def generate(prompt: str, num_samples: int, stop: str, **options) -> None:
    """Let the model in FOLDER (tinygpt's, or GPT-2 as downloaded from the hub) continue a text.

    Prints the prompt and its continuation as it comes. Without a prompt the model begins a text. For answers
    of a model that was tuned to instructions: tinygpt chat.
    """
    from ..text.stream import encode_prompt

    _, tokenizer, continuation = _speaker(**options)
    if prompt == "-":
        prompt = _from_stdin(lambda: sys.stdin.read()).removesuffix("\n")
    ids = encode_prompt(tokenizer, prompt)
    for n in range(num_samples):
        say("-" * 15 + "\n" + prompt if n else prompt, nl=False)
        for piece in continuation(ids, stop):
            say(piece, nl=False)
        say()


@main.command()
@_sampling(stop=None, shown="a blank line; none after tinygpt sft", required=False)
@click.option("--story", "told", type=_FOLDER, help="Talk to a model of the story there instead.")
@click.option("--stage", default="sft", metavar="NAME", help="base, sft, rlhf, lora or ptuning.")
@click.option("--compare", metavar="NAME,NAME", help="Several of these, asked the same.")
def chat(folder, told, stage: str, compare: str | None, stop, adapter_folder, **options) -> None:
    """Talk with the model in FOLDER, line by line; Ctrl-D ends it.

    A model that was tuned to instructions (tinygpt sft) is asked in their form; any other continues the
    conversation as plain text. What no longer fits its context is forgotten. A story's model, and an untuned
    one of a world, take each line alone.
    """
    from ..lab import story

    chose = "stage" in _given()
    if (folder and told) or not (folder or told or compare or chose):
        raise click.UsageError("say which model: FOLDER, or a story's as --story FOLDER --stage NAME")
    if told is None:
        if compare or chose:
            raise click.UsageError("--stage and --compare are of a story: name it as --story FOLDER")
        partners = {"": _talker(folder, adapter_folder, stop, False, **options)}
    elif adapter_folder:
        raise click.UsageError("--story has its own adapters: leave out --adapter-folder")
    elif compare and chose:
        raise click.UsageError("--compare names the stages: leave out --stage")
    else:
        names = [name.strip() for name in compare.split(",")] if compare else [stage]
        partners = {name: _talker(*story.where(told, name), stop, True, **options) for name in names}
    person = is_terminal(sys.stdin)
    if told and person:
        say("Each question stands alone. Ask for example, or begin a sentence for the base:")
        say("\n".join(f"  {asked}" for asked in story.questions(told)))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = _from_stdin(lambda: input("> " if person else ""))
            for name, talk in partners.items():
                try:
                    pieces = talk(line)
                except UserError as error:
                    if not person:
                        raise
                    say(f"tinygpt: {_one_line(error)}", err=True)  # a slip does not end it
                    continue
                say(f"{name + ':':9}" if compare else "", nl=False)
                for piece in pieces:
                    say(piece, nl=False)
                say()
    if person:
        say()


def _talker(
    folder: Path, adapter_folder: Path | None, stop: str | None, alone: bool, **options
) -> Callable:  # fmt: skip
    """A function from what is said to the pieces of the answer; unless `alone` it remembers what was said."""
    import numpy as np

    from ..text import instructions
    from ..text.stream import encode_prompt

    model, tokenizer, continuation = _speaker(folder, adapter_folder, **options)
    size, tuned = model.context, instructions.is_tuned(tokenizer)
    stop = ("" if tuned else "\n\n") if stop is None else stop
    said, context = [], np.zeros(0, np.int32)

    def asked(line: str) -> np.ndarray:
        if not tuned and tokenizer.documents:  # a line begins a document of its own
            return encode_prompt(tokenizer, line)
        if not tuned:
            new = tokenizer.encode(line + "\n")
            return np.concatenate([context, new])[-max(size, len(new)) :]
        turn = {"role": "user", "content": line}
        while said and len(instructions.prompt(tokenizer, [*said, turn])) > size // 2:
            del said[:2]  # the other half is for the answer
        return instructions.prompt(tokenizer, [*said, turn])

    def spoken(line: str, ids: np.ndarray) -> Iterable[str]:
        nonlocal context
        answer = ""
        for piece in continuation(ids, stop):
            piece = piece if answer or not tuned else piece.lstrip()
            yield piece
            answer += piece
        if alone:
            return
        said.extend(instructions.pair(line, answer))
        context = np.concatenate([ids, tokenizer.encode(answer + (stop or "\n"))])

    return lambda line: spoken(line, asked(line))


@main.command()
@click.argument("folder", type=_FOLDER)
@_adapter_folder
@click.option("--data", metavar="FILE", show_default="the world that the model was trained on",
              help='JSON Lines: {"prompt": "...", "completion": "..."}, perhaps with "choices": [...]; or '
                   "the folder of tinygpt world, or world:SEED.")  # fmt: skip
@click.option("--task", default="mappings",
              type=click.Choice(("mappings", "people", "questions", "phrases", "reviews")),
              help="Of the world. mappings: words whose labels are drawn anew for each prompt.")  # fmt: skip
@click.option("--shots", multiple=True, type=_COUNT_OR_0, default=(0, 1, 2, 4, 8),
              help="Examples before the question; repeat.")  # fmt: skip
@click.option("--style", type=click.Choice(("table", "arrow", "colon", "lines", "chat")),
              show_default="chat after tinygpt sft, else as the world has it",
              help="How questions and answers are written down; chat: as earlier turns.")  # fmt: skip
@click.option("--control", type=click.Choice(("", "shuffled", "unseen", "reordered")), default="",
              show_default="none", metavar="NAME", help="Of mappings: shuffled labels, an unseen word asked "
                                                        "for, or reordered examples.")  # fmt: skip
@click.option("--free", is_flag=True, help="Let it write the answer, instead of scoring the choices.")
@click.option("--count", default=500, type=_COUNT, help="Questions.")
@click.option("--seed", default=1337, type=_COUNT_OR_0, help="Of the examples drawn from a file.")
def fewshot(folder, adapter_folder, data, task, shots, style, control, free, count, seed) -> None:
    """Ask the model in FOLDER with examples before the question: no weight changes.

    A row for each number of examples: how often the answer is right, of the choices the likeliest, or what
    the model writes; of mappings also how often the best possible predictor is.
    """
    from ..folders.adapters import load_model
    from ..lab import report
    from ..stages import fewshot as stage
    from ..text import instructions
    from ..world import corpus

    model, tokenizer = load_model(folder, adapter_folder)
    usual = "table" if task == "mappings" else "arrow"  # as the corpus has them
    style = style or ("chat" if instructions.is_tuned(tokenizer) else usual)
    data = data or _world_of(folder, "questions")
    world = corpus.world_of(data) if corpus.is_source(data) else None
    if control and (world is None or task != "mappings"):
        raise click.UsageError("--control is for --task mappings")
    for n, k in enumerate(sorted(set(shots))):
        if world is None:
            prompts = stage.from_file(data, k, count, seed)
        elif task == "mappings":
            prompts = stage.mappings(world, k, count, control)
        else:
            prompts = stage.from_world(world, task, k, count)
        rate = stage.accuracy(model, tokenizer, prompts, style, free)
        best = sum(prompt.optimal for prompt in prompts) / len(prompts)
        known = not math.isnan(best)
        if not n:
            head = f"{'examples':>8} {'right':>9}  95% interval {'of':>9}"
            say(head + f"  {'best possible':>13}" * known)
        say(f"{k:8} {report.interval(rate)} {rate.n:7,}" + f"  {best:13.3f}" * known)
    shown = tokenizer.decode(stage.encoded(tokenizer, prompts[0], style))
    say(f"\nThe first prompt of the last row, and its right answer:\n{shown} | {prompts[0].answer}")


@main.group()
def tokenizer() -> None:
    """Train a byte-level BPE, or see how a text is split."""


@tokenizer.command("train")
@click.option("--data", multiple=True, metavar="PATH", show_default="Python's own documentation", help=
              "A UTF-8 text file, or a folder of .txt, .md and .rst files; repeat for several.")  # fmt: skip
@click.option("--vocab-size", default=1024, type=_COUNT, help="256 bytes, 1 end of text, merges.")
@_out("tokenizer", "tokenizer", holds="the files")
def tokenizer_train(data: tuple[str, ...], vocab_size: int, out: Path, overwrite: bool) -> None:
    """Learn the merges that a text asks for: again and again, the most frequent pair becomes one token."""
    from ..files.atomic import lock, make_folder
    from ..text.data import documents, joined
    from ..text.tokenizer import BPETokenizer

    if (out / "config.json").exists():
        raise UserError(f"{out}: has a model, which another tokenizer makes unusable; name another folder")
    _check_out(out, "tokenizer.json", "tokenizer", overwrite)
    texts = documents(data)
    found = BPETokenizer.train(joined(texts), vocab_size)
    make_folder(out)
    lock(out)
    found.save(out)
    longest = sorted(set(found.tokens) - {name.encode() for name in found.special}, key=len)[-5:]
    say(f"{found.vocab_size} tokens, the longest {' '.join(map(_shown, longest))}")
    say(f"Saved in {out}. Next: {_command('tokenizer', 'show', str(out), 'some text')}")


@tokenizer.command("show")
@click.argument("folder", type=_FOLDER)
@click.argument("text")
def tokenizer_show(folder: Path, text: str) -> None:
    """Show how the tokenizer in FOLDER splits TEXT: its pieces, each merge in turn, the ids.

    A merge's number is its rank: of all pairs in a piece, the one learned first is merged first.
    """
    from ..text import tokenizer as tokenizers

    found = tokenizers.load(folder)
    count = 0
    for piece, steps, ids in found.explain(text):
        say(repr(piece))
        for rank, tokens in steps:
            name = "bytes" if rank is None else f"merge {rank}"
            say(f"  {name:>12}  {' '.join(map(_shown, tokens))}")
        say(f"  {'ids':>12}  {' '.join(map(str, ids))}")
        count += len(ids)
    say(f"{count} tokens for {len(text)} characters")


def _shown(token: bytes) -> str:
    """A token as text, where it is whole characters that can be printed, or as its bytes."""
    text = token.decode("utf-8", "replace").replace(" ", "\u2423")
    return text if text.isprintable() and "\ufffd" not in text else token.hex(" ").join("<>")


# --- all stages, measured: story, claims --------------------------------------------------------------------


@main.command()
@click.option("--seed", default=1337, type=_COUNT_OR_0, help="Of the world, and of everything.")
@click.option("--quick", is_flag=True, help="Two minutes, a fifth of the people; steps and RLHF need more.")
@click.option("--out", default="story", type=_PATH, help="Folder for all that is made.")
@click.option("--no-report", is_flag=True, help="Leave out report.html, which needs matplotlib.")
def story(seed: int, quick: bool, out: Path, no_report: bool) -> None:
    """A GPT's whole life in a small invented world: each stage, and what it changed. Eight minutes.

    It is pre-trained, asked with examples in the prompt, tuned to instructions, judged and steered (RLHF),
    and tuned once more by adapters that leave it as it is. The table at the end is measured in this run.
    Ctrl-C loses the stage under way, and the same command goes on. Then: tinygpt chat --story
    """
    from ..core import kernels
    from ..files.jsonfile import read_object
    from ..lab import page, report
    from ..lab import story as stages
    from ..lab.models import Lab

    _check_out(out)
    if (out / stages.FILE).exists():
        there = read_object(out / stages.FILE)
        if (there.get("seed"), there.get("quick")) != (seed, quick):
            which = f"--seed {short(there.get('seed'))}" + " --quick" * bool(there.get("quick"))
            raise UserError(f"{out}: has the story of {which}; --out takes another folder")
    if not quick and kernels.backend().__name__ != kernels.__name__:
        say("Without the C core this takes well over an hour; --quick takes a quarter of that.")
    began = time.perf_counter()

    def told(n: int, stage, found: dict | None) -> None:
        if found is None:
            at = _clock(time.perf_counter() - began)
            say(f"\n--- {n}/{len(stages.STAGES)} {stage.name} ({stage.term}), at {at}")
            say(textwrap.fill(stage.says, 100))
            return
        if "failed" in found:
            say(f"This stage failed: {found['failed']}", err=True)
        names = [*found.get("compares", ("before", "after")), "true"]
        for asked, *said in found.get("samples", ()):
            say(f"\n  > {asked}")
            for name, text in zip(names, said, strict=True):
                say(f"  {name + ':':13} {text}")
        for note in found.get("notes", ()):
            say(textwrap.fill(note, 100))

    out.mkdir(parents=True, exist_ok=True)
    try:
        found = stages.tell(Lab(out, seed, quick=quick, progress=_progress), told)
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on.")
        sys.exit(130)
    say(f"\n{report.story(found['stages'])}\n\nIn {_clock(time.perf_counter() - began)}.")
    if quick:
        say("This is --quick: too short for the chain of thought, and for RLHF, to show what they do.")
    if not no_report:
        try:
            (out / "report.html").write_text(page.html(found), encoding="utf-8")
            say(f"The curves are in {out / 'report.html'}.")
        except ImportError:
            install = shlex.join([sys.executable, "-m", "pip", "install", ".[plots]"])
            say(f"The curves, report.html, need matplotlib: {install}; then the same command.")
    say(f"Its models, for generate, label and fewshot, are in {out / found['folder']}.")
    say(f"Saved in {out}. Next: {_command('chat', '--story', str(out), '--compare', 'base,sft,rlhf')}")
    sys.exit(any("failed" in one for one in found["stages"].values()))


@main.command()
@click.argument("numbers", nargs=-1, type=_COUNT, metavar="[NUMBER]...")
@click.option("--seeds", default=2, type=_COUNT, help="So many worlds from 1337 on, each with its own base.")
@click.option("--seed", "chosen_seeds", multiple=True, type=_COUNT_OR_0, show_default="those of --seeds",
              help="These worlds; repeat.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="All claims, and not the core of them.")
@click.option("--list", "listed", is_flag=True, help="Print the claims, and stop.")
@click.option("--out", default="claims", type=_PATH, help="Folder for all that is made.")
def claims(numbers: tuple, seeds: int, chosen_seeds: tuple, every: bool, listed: bool, out: Path) -> None:
    """Measure what is said of pre-training, tuning, adapters and in-context learning: does it hold here?

    A NUMBER is a claim's; without one, the core of them, which takes 40 minutes for two seeds. Worlds, models
    and numbers are kept in --out: Ctrl-C loses the measurement under way, and the same command goes on. To
    measure anew, remove the folder.
    """
    from ..lab import claims as stage
    from ..lab import report

    if listed:
        for number, claim in stage.CLAIMS.items():
            say(f"{number:3}{'  core' if number in stage.CORE else '':6}  {claim.says}")
        sys.exit()
    _check_out(out)
    chosen = numbers or (tuple(stage.CLAIMS) if every else stage.CORE)
    for number in chosen:
        if number not in stage.CLAIMS:
            known = ", ".join(map(str, stage.CLAIMS))
            raise UserError(f"there is no claim {number}: known are {known}; --list says them")
    if chosen_seeds:
        _refuse(_given() & {"seeds"}, "--seed says which worlds")
    wanted = dict.fromkeys(chosen_seeds or range(1337, 1337 + seeds))
    try:
        found = stage.run(out, chosen, wanted, say)
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on.")
        sys.exit(130)
    for number, numbers_found in found.items():
        say(f"\n{report.claim(stage.CLAIMS[number], numbers_found)}")
    if found:
        say(f"\nSaved in {out / 'claims.json'}.")
    whole = (max(e.n for e in estimates.values()) == len(wanted) for estimates in found.values())
    sys.exit(not all(whole) or len(found) < len(set(chosen)))


# --- gradients and speed: exercise, gradcheck, bench --------------------------------------------------------


@main.command()
@click.argument("name", required=False)
@click.option("--out", type=_FILE, show_default="my_NAME.py", help="Where to write it.")
def exercise(name: str | None, out: Path | None) -> None:
    """Write a file with a forward pass, a blank backward for you to fill in, and a hint.

    `tinygpt gradcheck` then says whether your gradients are right. Without a NAME: list the exercises.
    """
    from ..check import exercises

    if name is None:
        for known, about in exercises.EXERCISES.items():
            say(f"{known:16} {about}")
        say(f"\nNext: {_command('exercise', 'linear')}")
        sys.exit()
    if name not in exercises.EXERCISES:
        raise UserError(f"there is no exercise {name}: known are {', '.join(exercises.EXERCISES)}")
    out = out or Path(f"my_{name}.py")
    if out.suffix != ".py":
        raise UserError(f"{out}: does not end in .py, by which gradcheck finds it; name another file")
    if not str(out).isprintable() or '"' in str(out):
        raise UserError(f"{out}: this name cannot stand in the file itself; name another file")
    command = _command("gradcheck", f"{out.as_posix()}:{name}")
    text = exercises.text(name, command)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out}: exists, with work of yours perhaps; --out names another file") from None
    say(f"Saved {out}. Fill in {name}_backward. Next: {command}")


def _shapes(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict:
    shapes = {}
    for value in values:
        name, _, sizes = value.partition("=")
        if not name or not all(size.strip().isdecimal() and int(size) for size in sizes.split(",")):
            raise click.BadParameter(f"{value!r} is not name=sizes, such as x=4,8")
        if name in shapes:
            raise click.BadParameter(f"{name} has two shapes")
        shapes[name] = tuple(map(int, sizes.split(",")))
    return shapes


@main.command()
@click.argument("target", required=False, metavar="[MODULE:NAME]")
@click.option("--shape", "shapes", multiple=True, callback=_shapes, help="An input's shape, x=4,8; repeat.")
@click.option("--rtol", "--tol", type=_MORE_THAN_0,
              help="Relative error that passes.  [default: 1e-6; 1e-7 for tinygpt itself]")  # fmt: skip
@click.option("--atol", type=_REAL, default=0.0, help="Absolute error that passes.")
@click.option("--seed", type=_COUNT_OR_0, default=0, help="Of inputs, upstream gradients, directions.")
@click.option("--strict", is_flag=True, help="Exit status 1 if a gradient could not be judged, too.")
@click.option("--allow-missing", is_flag=True, help="Exit status 0 if backward leaves out a gradient.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each gradient.")
def gradcheck(target: str | None, shapes: dict, rtol: float | None, atol: float, seed: int, strict: bool,
              allow_missing: bool, as_json: bool) -> None:  # fmt: skip
    """Compare hand-written gradients with finite differences.

    Of your own code: MODULE:NAME, or FILE.py:NAME, stands for NAME_forward and NAME_backward with inputs
    from NAME_inputs(rng) or --shape, or for an object with forward, backward, params and grads. Without it:
    of every operation and the whole model of tinygpt, in each backend.

    A gradient is ok, WRONG, MISSING (backward returns None for it) or NOT JUDGED (the differences are too
    uncertain to say). Exit status 1 if one is wrong or missing. In JSON, ok is null for what is neither right
    nor a failure.
    """
    from ..check import targets

    if target is None:
        if shapes:
            raise click.UsageError("--shape is for your own code: say which, as in mymodule:layernorm")
        checks = targets.check_project(rtol or 1e-7, atol, seed)
    else:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            checks = _check_own(target, shapes, rtol or 1e-6, atol, seed)
    rows, failing = [], {"wrong", "not judged" * strict, "missing" * (not allow_missing)}
    for name, backend, result in checks:
        word = result.verdict if result.ok else result.verdict.upper()
        if not as_json:
            say(f"{word:6} {backend:6} {name:23} {result}" if target is None else f"{word:6} {result}")
            for note in result.notes:
                say(f"note   {note}")
        rel_err = result.rel_err if math.isfinite(result.rel_err) else None  # JSON has no infinity
        ok = None if result.verdict not in ("ok", *failing) else result.ok
        rows.append({"name": name, "backend": backend, "rel_err": rel_err, "ok": ok})
        rows[-1] |= {"verdict": result.verdict, "problem": result.problem, "notes": result.notes}
    if as_json:
        say(json.dumps(rows, indent=1))
    sys.exit(any(row["verdict"] in failing for row in rows))


def _check_own(target: str, shapes: dict, rtol: float, atol: float, seed: int) -> list[tuple]:
    """Name, "user" and result of each gradient; what the user's code raises is reported in one line."""
    from ..check import targets
    from ..check.gradcheck import gradcheck

    try:
        pair = targets.find(target, shapes)
        return [(result.name, "user", result) for result in gradcheck(*pair, rtol, atol, seed=seed)]
    except targets.MissingInputsError as error:
        say(f"tinygpt: {error}: {error.remedy}", err=True)
        sys.exit(2)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        module = sys.modules.get(Path(target.rpartition(":")[0]).name.removesuffix(".py"))
        frames = traceback.extract_tb(error.__traceback__)
        frame = ([f for f in frames if f.filename == getattr(module, "__file__", None)] or frames)[-1]
        where = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        raise UserError(f"{target} raised {type(error).__name__}: {error} ({where})") from error


@main.command()
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--seconds", default=5.0, type=_MORE_THAN_0, help="For each job.")
@click.option("--quick", is_flag=True, help="A fraction of a second for each figure: does it run?")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each row.")
@click.option("--plot", type=_FILE, help="Draw what scaling found.")
def bench(jobs: tuple[str, ...], seconds: float, quick: bool, as_json: bool, plot: Path | None) -> None:
    """Measure speed, and the share of what this machine can do at most, which is measured too.

    A JOB is peak, gemm, train/SIZE, lora/SIZE, rlhf/small, generate/SIZE/BATCH, numpy/nano or scaling, such
    as train/nano or generate/small/64; without one, all but scaling and those of GPT-2 124M. A time is the
    median of a training step, or of a token for each prompt.
    """
    from ..check import bench as benchmarks

    rows, draw = [], benchmarks.plotter(plot, jobs) if plot else None
    for row in benchmarks.run(list(jobs), 0.2 if quick else seconds):
        cells = ["" if value is None else f"{value:,}" for name, value in row.items() if name != "job"]
        if not as_json:
            if not rows:
                say(f"{'':21}" + "".join(f"{name:>19}" for name in row if name != "job"))
            say(f"{row['job']:21}" + "".join(f"{cell:>19}" for cell in cells))
        rows.append(row)
    if as_json:
        say(json.dumps(rows, indent=1))
    if plot:
        draw(rows)
        say(f"Drawn in {plot}.", err=True)
