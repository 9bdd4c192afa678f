"""The parts that all demos share: the folder, the seed, and the models that one demo makes for another."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from tinygpt import GPT
from tinygpt.errors import UserError
from tinygpt.folders import checkpoint
from tinygpt.stages.reward import Judge
from tinygpt.text.data import Tokenizer

FOLDER, SEED = Path("out/demo"), 1337


@contextmanager
def command_line(about: str) -> Iterator[Path]:
    """Yields the folder of the command line, or FOLDER. --help prints `about`. Errors become one line."""
    arguments = sys.argv[1:]
    if len(arguments) > 1 or arguments and arguments[0].startswith("-"):
        print(about)
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    sys.stdout.reconfigure(line_buffering=True)  # through a pipe too
    try:
        yield Path(arguments[0]) if arguments else FOLDER
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nStopped. Saved models are kept. The model that this demo was training is lost.")


def pretrained(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model of demo 1."""
    return checkpoint.load(_made_by("1_pretrain", folder, folder))


def tuned(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model of demo 2."""
    return checkpoint.load(_made_by("2_instructions", folder, folder / "tuned"))


def judge(folder: Path) -> Judge:
    """The judge of demo 4."""
    model, _ = checkpoint.load(_made_by("4_reward_model", folder, folder / "judge"), judge=True)
    return Judge(model, *tuned(folder))


def _made_by(demo: str, folder: Path, model: Path) -> Path:
    """Returns the folder `model`. Where it has no model, the demo makes the model first."""
    if not (model / "model.safetensors").exists():
        import_module(demo).main(folder)  # the name begins with a digit, so `import` cannot spell it
    return model
