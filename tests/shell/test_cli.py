"""The small commands: `tinygpt tokenizer`, `tinygpt bench`, and what every command does with a mistake.

Those of pretrain, generate, chat and gradcheck have their tests beside their modules'.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.check import bench
from tinygpt.core import kernels
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.shell.cli import IN_PARALLEL, main
from tinygpt.text.tokenizer import BPETokenizer, CharTokenizer

TEXT = "the cat sat on the mat. the dog lay in the sun. " * 20


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    Path("pipes/world.json").mkdir(parents=True)  # what stands for a file, and is none
    Path("loop").symlink_to("loop")
    return lambda *args, **more: CliRunner().invoke(main, args, **more)


def test_a_tokenizer_is_trained_and_shown(run):
    """Guards: merges shown in another order than they are made, ids that are not the tokenizer's."""
    trained = run("tokenizer", "train", "--data", "text.txt", "--vocab-size", "270", "--out", "tok")
    assert trained.exit_code == 0 and trained.stdout.startswith("270 tokens")
    shown = run("tokenizer", "show", "tok", "the 한").stdout.splitlines()
    # 't' first; then of ' t' and 'he', both frequent, whichever merge was learned first
    first = shown.index("'the'")
    steps = [line.split()[-1] for line in shown[first + 1 :] if line.split()[0] in ("bytes", "merge")][:3]
    assert steps[0] == "e" and steps[-1] in ("he", "the")
    assert "<ed> <95> <9c>" in "\n".join(shown)  # a character that was not in the text: its bytes
    assert shown[-1].endswith("tokens for 5 characters")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("tokenizer", "train", "--data", "nowhere.txt"), "nowhere.txt: no such file or folder"),
        (("tokenizer", "train", "--data", "text.txt", "--vocab-size", "10"), "256"),
        (("tokenizer", "train", "--data", "text.txt", "--out", "text.txt"), "text.txt: is a file"),
        (("tokenizer", "train", "--data", "text.txt", "--vocab-size", "200001"), "too large"),
        (("tokenizer", "show", "nowhere", "text"), "nowhere"),
        (("bench", "train/huge"), "train/huge: not a job; there are peak, "),
        (("generate", "nowhere"), "nowhere: no such folder"),
        (("generate", ""), "folder is an empty text"),
        (("pretrain", "--data", "text.txt", "--out", ""), "--out is an empty text"),
        (("pretrain", "--resume", ""), "--resume is an empty text"),
        (("tokenizer", "train", "--data", ""), "--data is an empty text"),
        (("chat", "--story", ""), "--story is an empty text"),
        (("bench", "--seconds", "nan", "peak"), "seconds is nan"),
        (("exercise", "linear", "--out", 'a"b.py'), "this name cannot stand in the file"),
        (("exercise", "linear", "--out", "a\nb.py"), "this name cannot stand in the file"),
        (("pretrain", "--data", "text.txt", "--adapter", "lora", "--lora-rank", str(10**18)), "more than"),
        (("pretrain", "--data", "text.txt", "--out", "loop"), "loop"),
        (("sft", "--init-from", "loop", "--data", "text.txt"), "loop"),
    ],
)
def test_a_mistake_is_one_line(run, args, says):
    """Guards: a traceback, an exit status that scripts take for success, two lines where one does."""
    if args[0] == "bench" and "c" not in kernels.available():
        pytest.skip("bench measures the C core")
    result = run(*args)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and says in result.stderr


def test_a_world_whose_mark_is_no_file_is_no_text(run):
    """Guards: a folder whose world.json is a pipe or a folder, read as plain text without a word."""
    result = run("pretrain", "--data", "pipes")
    assert result.exit_code == 2 and "world.json: is not a regular file" in result.stderr


def test_a_tokenizer_is_not_written_over(run):
    """Guards: a folder of somebody's lost to a second run."""
    train = "tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok"
    for extra, status in ((), 0), ((), 2), (("--overwrite",), 0):
        result = run(*train, *extra)
        assert result.exit_code == status


def test_a_special_token_in_a_prompt_is_characters_unless_asked_for(run, tmp_path):
    """Guards: a text that ends itself without a word; a chat in which a user writes the end token."""
    tokenizer = BPETokenizer.train("the cat sat", 260)
    model = GPT(GPTConfig(260, 32, n_layer=1, n_head=1, n_embd=8), np.random.default_rng(0))
    checkpoint.save(tmp_path / "model", model, tokenizer)
    prompt = "the<|endoftext|>" * 7  # as characters this is more than the context
    generate = ("generate", str(tmp_path / "model"), "--prompt", prompt, "--max-new-tokens", "1")
    result = run(*generate)
    assert "the prompt spells <|endoftext|>" in result.stderr and "are cut" in result.stderr
    assert not run(*generate, "--special-tokens").stderr
    result = run("chat", str(tmp_path / "model"), "--max-new-tokens", "1", input=f"{prompt}\n")
    assert "the message spells <|endoftext|>, which is taken as characters" in result.stderr


def test_help_is_quick():
    """Guards: an import that makes --help slow."""
    code = "import sys; from tinygpt.shell.cli import main; main(['--help'], standalone_mode=False); "
    code += "print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stderr.split())
    assert not loaded & {"matplotlib", "tinygpt.lab.claims", "tinygpt.lab.page"}
    assert "pretrain" in result.stdout


def test_only_commands_of_several_processes_have_the_option_for_them(run):
    for name in ("pretrain", "sft", "reward", "rlhf"):
        assert ("--hang-timeout SECONDS" in run(name, "--help").stdout) == (name in IN_PARALLEL), name
    for value in ("nan", "0", "-1"):
        assert "--hang-timeout" in run("pretrain", "--hang-timeout", value).stderr


@pytest.mark.skipif("c" not in kernels.available(), reason="bench measures the C core")
def test_bench_reports_each_job(run):
    """Guards: a job that does not run, a field that goes missing, a share of peak that cannot be."""
    result = run("bench", "--quick", "--json", "peak", "train/nano", "generate/nano/1")
    rows = json.loads(result.stdout)
    assert [row["job"] for row in rows] == ["peak", "train/nano", "generate/nano/1"]
    for row in rows[1:]:
        assert row["ms"] > 0 and row["tokens_per_s"] > 0 and 0 < row["share_of_peak"] < 1.5
        assert 20 < row["peak_rss_mib"] < 1000
    assert set(bench.SLOW) < set(bench.JOBS)


@pytest.mark.skipif("c" not in kernels.available(), reason="bench measures the C core")
def test_the_operations_of_a_token_grow_with_its_context_by_attention_alone():
    """Guards: the table of positions, which is looked up, among the multiply-adds."""
    config = GPTConfig(50, 128, n_layer=2, n_head=2, n_embd=32)
    for kind in ("train", "lora"):
        short, long = (ops / tokens for _, _, tokens, ops, _ in (
            bench._training(config, 3, T, "float32", kind) for T in (64, 128)
        ))  # fmt: skip
        assert long - short == 6 * 2 * 32 * 64


def test_a_closed_pipe_is_no_error(run):
    """Guards: `tinygpt ... | head` that ends in a message about a broken pipe."""
    command = f"{sys.executable} -c 'from tinygpt.shell.cli import main; main()' tokenizer show"
    run("tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok")
    words = " ".join(["word"] * 3000)
    result = subprocess.run(f"{command} tok '{words}' | head -1", shell=True, capture_output=True, text=True)
    assert result.stdout == "'word'\n" and not result.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors as a POSIX shell does")
def test_a_closed_standard_input_is_one_line(tmp_path):
    """Guards: an AttributeError of None, in a traceback."""
    tokenizer = CharTokenizer.train("hello")
    checkpoint.save(tmp_path, GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 4)), tokenizer)
    for command in f"generate {tmp_path} --prompt -", f"chat {tmp_path}":
        shell = f"{sys.executable} -m tinygpt {command} <&-"
        result = subprocess.run(shell, shell=True, capture_output=True, text=True)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1] == "tinygpt: standard input is closed: there is no text to read"


def test_documents_name_commands_and_options_that_there_are():
    """Guards: an option that was renamed and lives on in a README."""
    root, seen = Path(__file__).parents[2], 0
    for file in (*root.glob("README*.md"), *(root / "demos").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        fence = re.compile(r"^```\w*$(.*?)^```$", re.DOTALL | re.MULTILINE)
        fenced, spans = "\n".join(fence.findall(text)), re.findall(r"`([^`]+)`", fence.sub("", text))
        for code in [*fenced.splitlines(), *(span.replace("\n", " ") for span in spans)]:
            for name, rest in re.findall(r"(?<!from )\btinygpt ([a-z]+)\b([^#]*)", code):
                command = main.get_command(click.Context(main), name)
                parts = [command, *getattr(command, "commands", {}).values()]
                known = {option for part in parts for param in part.params for option in param.opts}
                assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= known, (file.name, name, rest)
                seen += 1
    assert seen > 30


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
@pytest.mark.parametrize("args", [
    ("world", "--documents", "50"), ("tokenizer", "train", "--data", "text.txt", "--vocab-size", "260"),
    ("pretrain", "--data", "text.txt", "--max-iters", "1"),
], ids=lambda args: args[0])  # fmt: skip
def test_a_folder_in_use_is_refused(run, args):
    """Guards: two processes that write one folder, each a half."""
    Path("busy").mkdir()
    program = "import sys; from pathlib import Path; from tinygpt.files.atomic import lock\n"
    program += "lock(Path('busy')); print('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        result = run(*args, "--out", "busy", "--overwrite")
        assert result.exit_code == 2 and "another process is writing there" in result.stderr
        assert not list(Path("busy").glob("*.*"))
        other.stdin.close()
