"""The command line. The modules of the commands are loaded at their first use."""

from __future__ import annotations

import io
import sys
import warnings

import click

from .. import __version__, launch
from ..errors import UserError
from .terminal import one_line, printable, say

ORDER = (  # the story, then a life
    "story", "pretrain", "world", "sft", "label", "reward", "rlhf", "merge", "generate", "chat", "look",
    "fewshot", "tokenizer", "claims", "exercise", "gradcheck", "bench",
)  # fmt: skip

# Errors of general types that are the user's, by a part of the text: too little memory to load NumPy; a loop
# in Path.resolve (an OSError from Python 3.13 on).
UNCLEAR = {ImportError: "failed to map", RuntimeError: "Symlink loop"}
IN_PARALLEL = "pretrain", "sft", "reward"  # commands that mpiexec can run


class Commands(click.Group):
    """A user's mistake becomes one line and exit status 2. A warning becomes one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        self._load()
        return self.commands.get(name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        name, command, args = super().resolve_command(ctx, args)
        if launch.launched()[1] > 1 and name not in IN_PARALLEL:
            raise UserError(f"{name} is one process: mpiexec is for {', '.join(IN_PARALLEL)}")
        return name, command, args

    def _load(self) -> None:
        """Imports all commands, and NumPy and the C core with them."""
        if not self.commands:
            from . import chat, checks, inference, label, laboratory, training

            for module in (inference, chat, label, laboratory, checks):
                for name, value in vars(module).items():
                    if isinstance(value, click.Command) and value.name == name:
                        self.add_command(value)
            for each in training.commands():
                self.add_command(each)

    def invoke(self, ctx: click.Context):
        rank, _ = launch.launched()  # process 0 prints the warnings
        warnings.showwarning = lambda message, *_: rank or say(f"tinygpt: {message}", err=True)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # ? for characters that the terminal lacks
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `tinygpt generate | head`: click ends quietly
            raise
        except click.ClickException as error:  # click prints it
            error.message = printable(error.message)
            raise
        except KeyboardInterrupt:  # commands that save something catch it themselves
            say(err=True)
            sys.exit(130)
        except (UserError, OSError, MemoryError, *UNCLEAR) as error:
            if any(isinstance(error, kind) and text not in str(error) for kind, text in UNCLEAR.items()):
                raise
            text = "not enough memory to load NumPy" if isinstance(error, ImportError) else one_line(error)
            say(f"tinygpt: {text}", err=True)
            sys.exit(2)
        finally:
            if atomic := sys.modules.get("tinygpt.files.atomic"):
                atomic.unlock()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A GPT on one CPU: train it, let it write, talk to it, and check its gradients."""
