"""What the demos share: their folder, their seed, and the models that they make for one another."""

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
    """The folder that a demo's command names, or FOLDER. `about` is for --help. Errors become one line."""
    given = sys.argv[1:]
    if len(given) > 1 or given and given[0].startswith("-"):
        print(about)
        sys.exit(0 if given in (["-h"], ["--help"]) else 2)
    sys.stdout.reconfigure(line_buffering=True)  # through a pipe too
    try:
        yield Path(given[0]) if given else FOLDER
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nStopped. What was saved is kept; what this demo was training is lost.")


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
    """The folder of a model, which the demo makes if it is not there."""
    if not (model / "model.safetensors").exists():
        import_module(demo).main(folder)  # the name begins with a digit, so `import` cannot spell it
    return model
