"""The program `tinygpt`, also as `python -m tinygpt`. Nothing is imported before Ctrl-C ends it quietly."""

import sys


def run() -> None:
    """Runs the command line. Ctrl-C during the imports gives exit status 130 and no traceback."""
    try:
        from .cli import main

        main(prog_name="tinygpt")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
