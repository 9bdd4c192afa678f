"""What a terminal gets: no control characters, a line that fits, and no traceback on Ctrl-C."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.shell.cli import main as cli_main
from tinygpt.shell.terminal import printable
from tinygpt.text.tokenizer import CharTokenizer

pty = pytest.importorskip("pty", reason="needs POSIX terminals")

TITLE = "\x1b]0;a title\x07"
HOSTILE = TITLE + "\r\x9b2J\u202e\x1b[31mb"
TRAINING = [*("--n-layer", "1", "--n-head", "1", "--n-embd", "4", "--block-size", "4"), "--max-iters", "3"]
assert cli_main  # imported once here: the first import compiles the files that the programs below import


def in_terminal(*args: str, columns: int = 80, **environment: str) -> tuple[int, str]:
    """The exit status of `tinygpt` with these arguments, and what a terminal of that width gets."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    variables |= {"TERM": "xterm", **environment}
    command = [sys.executable, "-m", "tinygpt", *args]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux: the last writer has closed its end
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    return process.wait(), b"".join(parts).decode().replace("\r\n", "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.train("a title\n" + HOSTILE)
    checkpoint.save(tmp_path / "model", GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 1, 4)), tokenizer)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    return tmp_path


def test_a_terminal_obeys_no_text(folder):
    """Guards: a model or a file that sets the window's title, or writes to the clipboard."""
    generate = "generate", "model", "--max-new-tokens", "0", "--prompt", HOSTILE
    status, text = in_terminal(*generate)
    assert printable(HOSTILE) == r"\x1b]0;a title\x07\r\x9b2J\u202e\x1b[31mb"
    assert status == 0 and text == printable(HOSTILE) + "\n"
    piped = subprocess.run([sys.executable, "-m", "tinygpt", *generate], capture_output=True, check=True)
    assert piped.stdout == (HOSTILE + "\n").encode()  # whoever wants the text gets the text


@pytest.mark.parametrize("args", [
    ("generate", f"no{TITLE}"), ("pretrain", "--data", f"no{TITLE}"), ("bench", f"no{TITLE}"),
    (f"no{TITLE}",), ("generate", f"--no{TITLE}"),
])  # fmt: skip
def test_a_terminal_obeys_no_name(folder, args):
    """Guards: a message with the name of a file in it as it is."""
    status, text = in_terminal(*args)
    assert status == 2 and r"\x1b]0;a title" in text and "\x1b" not in text


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_the_progress_line_fits(folder, columns):
    """Guards: a line that goes on below, over which the next one cannot be written: a screen full of them."""
    training = "pretrain", "--data", "text.txt", *TRAINING, "--max-iters", "2000"
    status, text = in_terminal(*training, "--eval-interval", "10000", columns=columns)
    lines = [line for line in re.split("\r\x1b\\[K", text)[1:] if "\n" not in line]
    assert status == 0 and len(lines) > 1
    assert max(map(len, lines)) < columns and min(map(len, lines)) >= min(19, columns - 1)
    assert any(line.startswith("[#") or line.startswith("[-") for line in lines) == (columns > 80)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_a_plain_terminal_gets_no_escapes(folder, variables):
    """Guards: escapes in the buffer of an editor."""
    status, text = in_terminal("pretrain", "--data", "text.txt", *TRAINING, **variables)
    assert status == 0 and "3/3" in text and "\x1b" not in text and "\r" not in text


@pytest.mark.parametrize("module", ["click", "tinygpt.shell.cli", "numpy", "tinygpt.core.model"])
def test_ctrl_c_during_the_imports(folder, module):
    """Guards: a traceback of the first half second."""
    program = f"""
import sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["generate", "model"]
from tinygpt.__main__ import run
run()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 130 and not result.stdout and not result.stderr.strip()


def test_a_closed_standard_output_is_no_error(folder):
    """Guards: an AttributeError of None; a run that is not saved."""
    for command in (f"pretrain --data text.txt {' '.join(TRAINING)}", "chat model", "--help"):
        program = f"echo a | {sys.executable} -m tinygpt {command} >&-"
        result = subprocess.run(program, shell=True, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, command
    assert checkpoint.load("out")[0].config.n_embd == 4


def test_a_clock_that_stands_still(folder, monkeypatch):
    """Guards: a division by zero seconds."""
    from click.testing import CliRunner

    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    result = CliRunner().invoke(cli_main, ["pretrain", "--data", "text.txt", *TRAINING])
    assert result.exit_code == 0, result.output
    assert np.isfinite(checkpoint.load("out")[0].flat).all()
