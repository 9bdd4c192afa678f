"""The program `tinygpt`, also as `python -m tinygpt`. Only `run` imports the rest."""

import os
import sys


def run() -> None:
    """Runs the command line. Ctrl-C during the imports gives exit status 130 and no traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `>&-` in a shell: or the next file to be opened would be this stream
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        from .shell.cli import main

        main(prog_name="tinygpt")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # `--help >/dev/full`
        sys.exit(f"tinygpt: {error.strerror}")


if __name__ == "__main__":
    run()
