"""The command line: one command per stage. Only this file and the demos parse arguments or print."""

from __future__ import annotations

import sys

import click

from . import __version__
from .errors import UserError


class Commands(click.Group):
    """Turns a user's mistake into one line and exit status 2."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            click.echo(f"tinygpt: {_one_line(error)}", err=True)
            sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """A GPT's whole life on one CPU: train it, tune it, prompt it, and check its every gradient."""


# --- tinygpt pretrain ------------------------------------------------------------------------------------------


# --- tinygpt generate, tinygpt chat ----------------------------------------------------------------------------


# --- tinygpt tokenizer -----------------------------------------------------------------------------------------


# --- tinygpt gradcheck -----------------------------------------------------------------------------------------
