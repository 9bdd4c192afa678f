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

from tinygpt.core import kernels
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
    """The one line that a failed command says."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def each(home: Path, *processes: list[str]) -> subprocess.CompletedProcess:
    """One run whose processes have different commands."""
    start = [word for words in processes for word in (":", "-n", "1", *words)]
    environment = {name: value for name, value in os.environ.items() if name != "TINYGPT_THREADS"}
    return subprocess.run(
        [MPIEXEC, *start[1:]], cwd=home, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("args, says", [
    ([*STAGES["pretrain"], "--out", "new"], "an update has 1 batches, which 2 processes cannot share"),
    ([*STAGES["pretrain"], *BATCHES, "--out", "base"], "base: already has a config.json"),
    ([*STAGES["pretrain"], *BATCHES, "--data", "nowhere"], "nowhere: no such file or folder"),
    ([*STAGES["pretrain"], *BATCHES, "--learning-rate", "1e30", "--overwrite"], "at iteration"),
    (["rlhf", "--init-from", "base"], "rlhf is one process: mpiexec is for pretrain, sft, reward"),
    (["generate", "base"], "generate is one process"),
])  # fmt: skip
def test_a_mistake_is_said_once(home, args, says):
    """Guards: a line of each process, a line of MPI's, a process that waits for one that has ended. And the
    status of a process that mpiexec killed, at another moment in each run."""
    for _ in range(3):
        line = failure(run(home, 2, *args))
        assert line.startswith("tinygpt: ") and says in line


@pytest.mark.parametrize("args, status, says", [
    (["--help"], 0, "Usage: "),
    (["--version"], 0, "version"),
    (["sft", "--help"], 0, "Usage: "),
    (["sft", "--init-from", "base"], 2, "give the examples as --data"),
    (["--no-such-option"], 2, "No such option"),
    (["pretrain", "--no-such-option"], 2, "No such option"),
])  # fmt: skip
def test_help_is_printed_once(home, args, status, says):
    """Guards: the same text from every process."""
    done = run(home, 2, *args)
    assert done.returncode == status and (done.stdout + done.stderr).count(says) == 1


BROKEN = "import sys; sys.modules['{}'] = None; import tinygpt.__main__ as main; main.run()"


@pytest.mark.parametrize("start, more, says", [
    ([sys.executable, "-m", "tinygpt"], ["--no-such-option"], "No such option"),
    ([sys.executable, "-m", "tinygpt"], ["--data", "nowhere"], "nowhere: no such file or folder"),
    pytest.param(
        ["env", "TINYGPT_ISA=none", sys.executable, "-m", "tinygpt"], [], "TINYGPT_ISA=none: not an",
        marks=pytest.mark.skipif("c" not in kernels.available(), reason="needs the C core"),
    ),
    ([sys.executable, "-c", BROKEN.format("numpy")], [], "import of numpy halted"),
    ([sys.executable, "-c", BROKEN.format("mpi4py")], [], "mpi4py, which mpiexec needs, is not installed"),
])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_ends_alone_ends_the_others(home, start, more, says, rank):
    """Guards: processes that wait for MPI to begin, and a process that cannot begin it."""
    args = [*STAGES["pretrain"], *SIZES, *BATCHES, "--out", "alone"]
    both = [command(1, *args), command(1, *args)]
    both[rank] = [*start, *args, *more]
    done = each(home, *both)
    assert done.returncode == (1 if "numpy" in says else 2) and done.stderr.count(says) == 1, done.stderr
    assert ("process 1 on" in done.stderr) == (rank == 1) and not (home / "alone").exists()


def test_the_wait_for_a_process_that_does_not_start_ends(home):
    """Guards: processes that wait for MPI to begin, on a machine whose neighbour has no tinygpt."""
    program = "from tinygpt import __main__ as main; main.launch.STARTING = 2; main.run()"
    waiting, missing = [sys.executable, "-c", program, *STAGES["pretrain"]], [sys.executable, "-c", ""]
    for processes in (waiting, missing, waiting), (missing, waiting, waiting):
        assert "MPI has not begun for 2 seconds" in failure(each(home, *processes))


@pytest.mark.parametrize("name, both, says", [
    ("pretrain", [["--seed", "1"], ["--seed", "2"]], "settings, model"),
    ("sft with lora", [["--seed", "1"], ["--seed", "2"]], "data, settings, adapter"),
    ("pretrain", [["--data", "text.txt"], ["--data", "other.txt"]], "data"),
])  # fmt: skip
def test_processes_that_differ_are_named(home, name, both, says):
    """Guards: weights that are those of no run, because a process trains with other settings or rounding. And
    an adapter where there is none."""
    (home / "other.txt").write_text(TEXT[::-1], encoding="utf-8")  # the same characters
    args = [*STAGES[name], *SIZES, *BATCHES, "--out", "differ"]
    line = failure(each(home, *(command(1, *args, *more) for more in both)))
    assert "process 1 on" in line and line.endswith(f"differ in: {says}")
    assert not (home / "differ" / "config.json").exists()


LIMIT = """
import resource
from tinygpt import __main__ as program
program.launch.start()  # MPI's own files are longer
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
program.run()
"""


@needs_proc
def test_a_full_disk_of_process_0_keeps_the_last_save(home, whole):
    """Guards: a file that is cut, and processes that wait for the process that could not write it."""
    process, ranks = begun(home, "full")
    os.kill(ranks[1], signal.SIGTERM)
    end(process, ranks)
    before, resume = state(home / "full"), ["pretrain", "--resume", "full"]
    room = len(before["trainer.safetensors"]) - 1000
    line = failure(each(home, [sys.executable, "-c", LIMIT.format(room), *resume], command(1, *resume)))
    before["metrics"] = (after := state(home / "full"))["metrics"]  # the records have more room
    assert "File too large" in line and before == after
    assert run(home, 2, "pretrain", "--resume", "full").returncode == 0 and state(home / "full") == whole


SLOW = """
import time
from tinygpt import __main__ as program
program.launch.start()
from tinygpt.errors import UserError
from tinygpt.files import atomic
from tinygpt.folders import runs
records, sync, writing = [], atomic.sync, runs.writing

def full(path):
    records.append(path)
    if len(records) == 3:
        raise UserError("no room for the third record")
    return writing(path)

def slow(path):  # after the moments have been gathered
    time.sleep((program.launch.GRACE + 2) * (len(records) == 3 and "trainer" in path.name))
    sync(path)

runs.writing, atomic.sync = full, slow
program.run()
"""


def test_an_error_of_process_0_does_not_end_its_save(home):
    """Guards: process 1, which ends process 0 in the middle of a long save, and hides its error."""
    args = [*STAGES["pretrain"], *SIZES, *BATCHES, "--out", "slow"]
    line = failure(each(home, [sys.executable, "-c", SLOW, *args], command(1, *args)))
    assert line == "tinygpt: no room for the third record" and not list((home / "slow").glob(".*part"))
    assert run(home, 2, "pretrain", "--resume", "slow").returncode == 0


LATE = """
import sys, time
import numpy as np
from tinygpt import launch
from tinygpt.core import parallel
from tinygpt.errors import UserError

def late():
    try:
        group = parallel.join(1.0)
        time.sleep(3 * group.rank)
        group.reduce(np.zeros(600, np.float32), [0, 300, 600], 0.0)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

launch.together(late)
"""


def test_a_late_process_takes_no_failure_for_gradients(home):
    """Guards: an exchange that receives the message of a process that has given up."""
    late = [sys.executable, "-c", LATE]
    assert "1 seconds (--hang-timeout)" in failure(each(home, late, late))


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
    args = command(1, *STAGES["pretrain"], *SIZES, *BATCHES, "--hang-timeout", "20", "--out", "threads")
    done = each(home, args, ["env", "TINYGPT_THREADS=2", *args])
    assert done.returncode == 0, done.stderr


def test_without_mpi4py_there_is_a_line(home):
    """Guards: runs of all processes in one folder."""
    (home / "site" / "mpi4py").mkdir(parents=True)
    (home / "site" / "mpi4py" / "__init__.py").write_text("raise ModuleNotFoundError('mpi4py')")
    args = [*STAGES["pretrain"], *BATCHES, "--out", "without"]
    done = run(home, 2, *args, PYTHONPATH=str(home / "site"))
    line = failure(done)
    assert line.startswith("tinygpt: mpi4py, which mpiexec needs") and "pip install" in line
    assert not (home / "without").exists()
