"""The program `tinygpt`, also as `python -m tinygpt`. Only `_command` imports the rest."""

import os
import sys

from . import launch
from .errors import UserError


def run() -> None:
    """Runs the command line, in all processes of mpiexec together."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `>&-` in a shell: or the next file to be opened would be this stream
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    launch.together(_command)


def _command() -> None:
    """Ctrl-C during the imports gives exit status 130 and no traceback."""
    try:
        with launch.time_limit():
            launch.start()
        from .shell.cli import main

        main(prog_name="tinygpt")
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:  # of `start`
        print(f"tinygpt: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # `--help >/dev/full`
        sys.exit(f"tinygpt: {error.strerror}")


if __name__ == "__main__":
    run()
