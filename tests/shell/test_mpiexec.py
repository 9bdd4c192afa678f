"""`mpiexec -n P tinygpt ...`: the same bytes for any number of processes, and what happens when one fails."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.text import instructions
from tinygpt.text.tokenizer import BPETokenizer

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH')}")
pytestmark = pytest.mark.skipif(
    not (MPIEXEC and importlib.util.find_spec("mpi4py")), reason="needs MPI: pip install '.[mpi]'"
)

TEXT = "the cat sat on the mat. the dog lay in the sun. " * 60
NAMES = ("Ada", "Alan", "Grace", "Edsger", "Barbara", "Donald", "Niklaus", "Ken", "Dennis", "Bjarne")
PAIRS = [{"prompt": f"Where is {name}?", "completion": f"{name} is at home"} for name in NAMES]
SIDES = [{"prompt": pair["prompt"], "chosen": "at home", "rejected": "at sea"} for pair in PAIRS]
SIZES = ["--max-iters", "6", "--eval-interval", "4", "--warmup-iters", "2", "--batch-size", "2"]
BATCHES = ["--gradient-accumulation-steps", "8"]
SMALL = ["--data", "text.txt", "--n-layer", "2", "--n-embd", "16", "--block-size", "16"]
TUNE = ["--init-from", "base", "--block-size", "192"]
STAGES = {
    "pretrain": ["pretrain", *SMALL, "--dropout", "0.1"],
    "sft": ["sft", *TUNE, "--data", "pairs.jsonl", "--no-packing"],
    "sft with lora": ["sft", *TUNE, "--data", "pairs.jsonl", "--adapter", "lora", "--lora-dropout", "0.1"],
    "relora": ["pretrain", *SMALL, "--adapter", "lora", "--merge-every", "2"],
    "reward": ["reward", *TUNE, "--data", "sides.jsonl", "--dropout", "0.1"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a text, a tuned model, examples and comparisons."""
    home = tmp_path_factory.mktemp("mpi")
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, rows in (("pairs", PAIRS), ("sides", SIDES)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (home / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = BPETokenizer.train(" ".join(map(json.dumps, [*PAIRS, *SIDES])) + "User: Assistant:", 300)
    tokenizer.chat_template = instructions.TEMPLATE
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=16)
    checkpoint.save(home / "base", GPT(config, np.random.default_rng(0)), tokenizer)
    return home


def command(processes: int, *args: str) -> list[str]:
    start = [MPIEXEC, "-n", str(processes)] if processes > 1 else []
    return [*start, sys.executable, "-m", "tinygpt", *args]


def run(home: Path, processes: int, *args: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TINYGPT_THREADS": "1"} | environment
    return subprocess.run(
        command(processes, *args), cwd=home, env=environment, capture_output=True, text=True, timeout=300
    )


def state(folder: Path) -> dict[str, bytes]:
    """The bytes of a run's files, and its records without times."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    times = ("tokens_per_s", "elapsed_s")
    return files | {"metrics": [{k: v for k, v in row.items() if k not in times} for row in records]}


@pytest.mark.parametrize("name", STAGES)
def test_the_same_bytes_for_any_number_of_processes(home, name):
    """Guards: sums in another order, random numbers of another batch, moments or records of another slice."""
    states = {}
    for processes in (1, 2, 4):
        out = f"{name}-{processes}".replace(" ", "-")
        done = run(home, processes, *STAGES[name], *SIZES, *BATCHES, "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Saved in") == 1  # one process prints
        states[processes] = state(home / out)
    assert states[1] == states[2] == states[4] and len(states[1]) == 3


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
LONG = [*STAGES["pretrain"], *SIZES, *BATCHES, "--max-iters", "120", "--eval-interval", "12"]


@pytest.fixture(scope="module")
def whole(home) -> dict:
    """The state of a longer run that one process makes without a break."""
    assert run(home, 1, *LONG, "--out", "whole").returncode == 0
    return state(home / "whole")


def begun(home: Path, out: str, *more: str) -> tuple[subprocess.Popen, list[int]]:
    """The longer run in two processes, after its first updates, and the numbers of the processes by rank."""
    process = subprocess.Popen(
        command(2, *LONG, *more, "--out", out), cwd=home, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"TINYGPT_TEST": out, "TINYGPT_THREADS": "1"},
    )  # fmt: skip
    metrics = home / out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 13):
        time.sleep(0.02)
    ranks = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "environ").read_text(errors="replace").split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            if variables.get("TINYGPT_TEST") == out and "PMI_RANK" in variables:
                ranks[int(variables["PMI_RANK"])] = int(path.name)
    return process, [ranks[0], ranks[1]]


def end(process: subprocess.Popen, ranks: list[int]) -> str:
    """What a run says until it ends, which it does soon."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        if process.poll() is None:
            for each in (*ranks, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


@needs_proc
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 130), (signal.SIGKILL, 9)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_with_another_number_of_processes(home, whole, rank, number, status):
    """Guards: a signal of which the others do not know, a process that waits for a dead one, moments that are
    lost with their process."""
    out = f"{number.name}-{rank}"
    process, ranks = begun(home, out)
    os.kill(ranks[rank], number)
    errors = end(process, ranks)
    assert process.returncode == status, errors
    if number == signal.SIGTERM:
        assert 13 < len(state(home / out)["metrics"]) < 120
    for processes in (4, 1):  # the second has nothing left to do
        done = run(home, processes, "pretrain", "--resume", out)
        assert done.returncode == 0, done.stderr
        assert state(home / out) == whole


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named(home, rank):
    """Guards: a run that waits for ever."""
    process, ranks = begun(home, f"hang-{rank}", "--hang-timeout", "3")
    os.kill(ranks[rank], signal.SIGSTOP)
    errors = end(process, ranks)
    assert process.returncode == 2 and f"no answer from process {rank} for 3 seconds" in errors


def failure(done: subprocess.CompletedProcess) -> str:
    """The one line that a failed command says, without what MPI adds."""
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line and not line.startswith("Abort")]
    return line


@pytest.mark.parametrize("args, says", [
    ([*STAGES["pretrain"], "--out", "new"], "an update has 1 batches, which 2 processes cannot share"),
    ([*STAGES["pretrain"], *BATCHES, "--out", "base"], "base: already has a config.json"),
    ([*STAGES["pretrain"], *BATCHES, "--data", "nowhere"], "nowhere: no such file or folder"),
    ([*STAGES["pretrain"], *BATCHES, "--learning-rate", "1e30", "--out", "nan"], "at iteration"),
    (["sft", "--init-from", "base"], "give the examples as --data"),
    (["rlhf", "--init-from", "base"], "rlhf is one process: mpiexec is for pretrain, sft, reward"),
    (["generate", "base"], "generate is one process"),
])  # fmt: skip
def test_a_mistake_is_said_once(home, args, says):
    """Guards: a line of each process, and a process that waits for one that has ended."""
    done = run(home, 2, *args)
    if "sft" in args:
        assert done.returncode == 2 and done.stderr.count(says) == 1
    else:
        assert says in failure(done)


def test_processes_that_differ_are_named(home):
    """Guards: weights that are those of no run, because a process trains with other settings or rounding."""
    args = [*STAGES["pretrain"], *SIZES, *BATCHES, "--out", "differ"]
    both = [*command(1, *args), "--seed", "1", ":", "-n", "1", *command(1, *args), "--seed", "2"]
    done = subprocess.run([MPIEXEC, "-n", "1", *both], cwd=home, capture_output=True, text=True, timeout=60)
    assert "process 1 on" in failure(done) and failure(done).endswith("differ in: settings, model, adapter")
    assert not (home / "differ" / "config.json").exists()


PIECES = """
import numpy as np
from tinygpt.core import parallel
parallel.PIECE = 60  # 20 numbers of each of 3 processes
group = parallel.join()
rows = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
flat, total, bounds = rows[group.rank].copy(), parallel.tree_sum(list(rows)), parallel.slices(1000, 3)
assert group.reduce(flat, bounds, 10.0**group.rank) == 111
begin, end = bounds[group.rank : group.rank + 2]
assert (flat[begin:end] == total[begin:end]).all()
group.gather(flat, bounds)
assert (flat == total).all()
assert group.texts("a" * group.rank) == ["", "a", "aa"] and group.agree(group.rank == 2, 0) == [True, False]
group.leave()
"""


def test_gradients_are_exchanged_in_pieces(home):
    """Guards: a piece that is left out, and slices of different lengths, which end in different pieces."""
    args = [MPIEXEC, "-n", "3", sys.executable, "-c", PIECES]
    done = subprocess.run(args, cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_one_process_may_set_its_threads(home):
    """Guards: an exchange that a process leaves out because of its environment: the others would hang."""
    args = [*STAGES["pretrain"], *SIZES, *BATCHES, "--hang-timeout", "20", "--out", "threads"]
    environment = {name: value for name, value in os.environ.items() if name != "TINYGPT_THREADS"}
    both = [*command(1, *args), ":", "-n", "1", "env", "TINYGPT_THREADS=2", *command(1, *args)]
    done = subprocess.run(
        [MPIEXEC, "-n", "1", *both], cwd=home, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_without_mpi4py_there_is_a_line(home):
    """Guards: runs of all processes in one folder."""
    (home / "site" / "mpi4py").mkdir(parents=True)
    (home / "site" / "mpi4py" / "__init__.py").write_text("raise ModuleNotFoundError('mpi4py')")
    args = [*STAGES["pretrain"], *BATCHES, "--out", "without"]
    done = run(home, 2, *args, PYTHONPATH=str(home / "site"))
    lines = sorted(done.stderr.splitlines())  # each process may be on another machine
    assert done.returncode == 2 and len(lines) == 2 and lines[0].startswith("tinygpt: mpi4py, which mpiexec")
    assert "process 1 on" in lines[1] and all("pip install" in line for line in lines)
    assert not (home / "without").exists()
