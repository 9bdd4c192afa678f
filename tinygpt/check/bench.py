"""How fast this machine runs tinygpt, and what share of the machine's limits the program reaches.

Each measurement runs in a process of its own: a warm-up, then steps for some seconds. The median step counts.
Just before, the C core measures the machine's limits with the same threads: the peak of multiply-adds in
registers, and the bandwidth of the memory. The operations of a training step are counted as

    6 x parameters x tokens  +  6 x layers x channels x T x tokens

(the tied table once; attention's causal half). A token's generation is counted as one read of all weights, of
4 bytes each, or 2 in bfloat16. A generation is timed as a whole, with its prompt, and divided by the new
tokens. In bfloat16 the peak is still the peak of float32.

`numpy/nano` is nano's training step on the NumPy backend. `lora/SIZE` is a training step of LoRA, rank 8 at
all projections. The base is frozen, so such a step has 4 x parameters x tokens. `rlhf/small` is an update of
RLOO: it samples 64 answers of 16 tokens, scores them by their length, and learns. `scaling` varies one size
of a training step at a time, with one thread and with all.

This file measures no other library. tests/peers/bench.py puts their figures beside these.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ..core import kernels, memory, ops
from ..core.config import PRESETS, GPTConfig
from ..core.generate import generate
from ..core.model import GPT
from ..core.optim import AdamW
from ..core.train import Batch, gradients
from ..errors import UserError
from ..stages import rlhf
from ..stages.adapter import AdapterConfig
from ..stages.variants import create

TRAIN = {"nano": (12, 64), "small": (16, 128), "baby": (4, 256), "gpt2": (4, 64)}  # batch, T
LORA = ("small", "gpt2")
RLHF = {"small": (16, 4, 12, 16)}  # prompts, answers to each, tokens of a prompt, of an answer
GENERATE = {"nano": (1, 64), "small": (1, 64), "gpt2": (1, 8)}  # batches
CONTEXT, PROMPT, NEW = 256, 16, 100  # of generation: positions, tokens of a prompt, tokens after it
GEMM = ("768x768x768", "1024x3072x768", "768x384x128", "768x128x512", "2048x1024x256", "2048x2048x2048",
        "256x50304x768")  # fmt: skip
SCALING = {  # one of these sizes at a time, the others as in BASE
    "T": (64, 128, 256, 512, 1024),
    "C": (64, 128, 192, 256, 384, 512, 768),
    "B": (1, 2, 4, 8, 16, 32, 64),
}
BASE = {"T": 128, "C": 256, "B": 8}
THREADS = sorted({1, kernels.processors()})  # of scaling
Row = dict[str, object]


def run(jobs: list[str], seconds: float = 5.0, dtype: str = "float32") -> Iterator[Row]:
    """Measures `jobs` in their order, and yields one row for each measurement. No jobs: all except SLOW.

    A job is timed for `seconds`, and for three calls at least. `gemm` divides `seconds` among its rows. Each
    row of `scaling` gets a quarter of `seconds`. Before each row the limits of the machine are measured, for
    at most a second. dtype: see GPT.compute_in. A row has these fields, each None where it has no meaning:

        job                             such as train/nano
        ms                              the median time of a step; of generate: one token for each prompt
        tokens_per_s
        gflops, share_of_peak           10^9 operations per second; their share of the multiply-add peak
        gb_per_s, share_of_bandwidth    10^9 bytes per second; their share of the memory's bandwidth
        peak_rss_mib                    the largest memory of the process, in MiB

    Raises UserError for an unknown job, without the C core, and if a measurement fails.
    """
    for job in jobs:
        if job not in JOBS:
            raise UserError(f"{job}: not a job; there are {', '.join(JOBS)}")
    if "c" not in kernels.available():
        raise UserError("bench measures the C core, which is not built here")
    for job in jobs or [job for job in JOBS if job not in SLOW]:
        share = {"gemm": len(GEMM), "scaling": 4}.get(job, 1)
        for name in JOBS[job]:
            threads = {"TINYGPT_THREADS": name.split("/")[2]} if job == "scaling" else {}
            limits = _apart(threads, "machine", min(1.0, seconds / 4))
            yield _apart(threads, "_measure", name, dtype, seconds / share, *limits)


def _apart(variables: dict[str, str], function: str, *args):
    """The result of a function of this module in a new process, with more environment variables."""
    code = "import json, sys; sys.path[:], name, args = json.loads(sys.argv[1]); "
    code += "from tinygpt.check import bench; print(json.dumps(getattr(bench, name)(*args)))"
    command = [sys.executable, "-c", code, json.dumps([sys.path, function, args])]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UserError(f"the process that measures has failed ({reason})")
    return json.loads(result.stdout)


def machine(seconds: float) -> tuple[float, float]:
    """Operations per second in float32 (a multiply-add is two), and bytes per second read from memory.

    Both are limits, so the best of many tries counts.
    """
    out, flops, tasks = np.zeros(64, np.float32), np.zeros(1), 64
    far = memory.empty(1 << 26, np.float32)  # 256 MiB: beyond any cache
    far[:] = 1
    best = [0.0, 0.0]
    end = time.perf_counter() + seconds
    while not best[1] or time.perf_counter() < end:
        start = time.perf_counter()
        kernels._run("fma_peak", out.dtype, out, flops, tasks, 50_000)
        middle = time.perf_counter()
        kernels._run("read_memory", out.dtype, out, far, tasks, far.size)
        best[0] = max(best[0], flops[0] / (middle - start))
        best[1] = max(best[1], far.nbytes / (time.perf_counter() - middle))
    return best[0], best[1]


def _measure(name: str, dtype: str, seconds: float, peak: float, bandwidth: float) -> Row:
    """The row `name`."""
    import resource  # not on Windows, where there is no C core

    ms, tokens, flops, read = None, None, peak, bandwidth  # per second; this is the row of the job "peak"
    if name != "peak":
        step, steps, *amounts = ROWS[name](dtype)
        ms = median_ms(step, seconds) / steps
        tokens, flops, read = (amount and amount / ms * 1e3 for amount in amounts)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return {
        "job": name,
        "ms": ms and round(ms, 4),
        "tokens_per_s": tokens and round(tokens, 1),
        "gflops": flops and round(flops / 1e9, 1),
        "share_of_peak": flops and round(flops / peak, 3),
        "gb_per_s": read and round(read / 1e9, 1),
        "share_of_bandwidth": read and round(read / bandwidth, 3),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
    }


def median_ms(step: Callable[[], object], seconds: float) -> float:
    """The median time of `step` in ms. Two calls warm up. Then the calls of `seconds` seconds are timed, at
    least three."""
    times = []
    for _ in range(2):
        step()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


# The functions below return (a function to time, its number of steps; a step's tokens, operations, and bytes
# that it reads).


def _gemm(shape: str, dtype: str) -> tuple:
    M, N, K = map(int, shape.split("x"))
    a, b, out = (memory.empty(shape, np.float32) for shape in ((M, K), (K, N), (M, N)))
    a[:], b[:] = (np.random.default_rng(0).standard_normal(x.shape) for x in (a, b))
    near = dtype == "bfloat16"
    return lambda: kernels.gemm(a, b, out=out, bfloat16=near), 1, None, 2 * M * N * K, None


def _training(config: GPTConfig, B: int, T: int, dtype: str, kind: str = "train") -> tuple:
    """A training step; `kind` may be numpy or lora."""
    config = dataclasses.replace(config, block_size=T)
    rng = np.random.default_rng(0)
    model = GPT(config, rng, ops=ops if kind == "numpy" else None)
    model = create(model, AdapterConfig("lora"), rng) if kind == "lora" else model
    model.compute_in(dtype)
    optimizer = AdamW(model)
    ids, targets = rng.integers(0, config.vocab_size, (2, B, T)).astype(np.int32)
    compute = gradients(optimizer)
    batch = Batch(ids, targets, np.full((B, T), 1 / (B * T), np.float32))

    def step() -> None:
        compute([batch])
        optimizer.step(1e-3)

    attention = 6 * config.n_layer * config.n_embd * T
    size = model.flat.size - model.params["wpe.weight"].size  # a position's row is looked up
    weights = 4 * size + 6 * model.trained.flat.size if kind == "lora" else 6 * size
    return step, 1, B * T, (weights + attention) * B * T, None


def _scaling(axis: str, n: int, dtype: str) -> tuple:
    T, C, B = (BASE | {axis: n}).values()
    return _training(GPTConfig(1024, T, n_layer=4, n_head=C // 64, n_embd=C), B, T, dtype)


def _generation(size: str, batch: int, dtype: str) -> tuple:
    """A function that samples NEW tokens for each of `batch` prompts."""
    rng = np.random.default_rng(0)
    model = GPT(dataclasses.replace(PRESETS[size], block_size=max(CONTEXT, PRESETS[size].block_size)), rng)
    model.compute_in(dtype)
    prompts = list(rng.integers(0, model.config.vocab_size, (batch, PROMPT)).astype(np.int32))
    weights = model.flat.size - model.params["wpe.weight"].size
    read = (2 if dtype == "bfloat16" else 4) * weights
    return lambda: generate(model, prompts, NEW, rng=rng), NEW, batch, 2 * weights * batch, read


def _rloo(size: str, dtype: str) -> tuple:
    """A whole update of RLOO, with the exact KL that it reports."""
    rng, config = np.random.default_rng(0), dataclasses.replace(PRESETS[size], block_size=128)
    model, (prompts, answers, length, new) = GPT(config, rng), RLHF[size]
    model.compute_in(dtype)
    optimizer, ids = AdamW(model), rng.integers(3, config.vocab_size, (prompts, length)).astype(np.int32)
    tokens = SimpleNamespace(stops={2}, special={}, vocab_size=config.vocab_size,
                             decode=lambda ids: str(ids.tolist()))  # fmt: skip
    settings = rlhf.Config(num_prompts=prompts, num_generations=answers, max_new_tokens=new)
    learner = rlhf.Trainer(
        optimizer, model.copy(), tokens, settings, [(str(n), row) for n, row in enumerate(ids)],
        lambda questions, replies: np.array([float(len(text)) for text in replies]),
    )  # fmt: skip

    def step() -> None:
        learner.compute(learner.update(optimizer.steps, rng), rng)
        optimizer.step(1e-5)

    return step, 1, prompts * answers * new, None, None


ROWS: dict[str, Callable[[str], tuple] | None] = {  # what to measure, as a function of dtype
    "peak": None,
    **{f"gemm/{shape}": partial(_gemm, shape) for shape in GEMM},
    **{f"train/{size}": partial(_training, PRESETS[size], *TRAIN[size]) for size in TRAIN},
    "numpy/nano": partial(_training, PRESETS["nano"], *TRAIN["nano"], kind="numpy"),
    **{f"lora/{size}": partial(_training, PRESETS[size], *TRAIN[size], kind="lora") for size in LORA},
    **{f"rlhf/{size}": partial(_rloo, size) for size in RLHF},
    **{f"scaling/{axis}={n}/{threads}": partial(_scaling, axis, n)
       for axis in SCALING for threads in THREADS for n in SCALING[axis]},
    **{f"generate/{size}/{batch}": partial(_generation, size, batch)
       for size in GENERATE for batch in GENERATE[size]},
}  # fmt: skip
JOBS: dict[str, list[str]] = {}  # the names of a job's rows
for name in ROWS:
    JOBS.setdefault(name.split("/")[0] if name.startswith(("gemm", "scaling")) else name, []).append(name)
SLOW = {job for job in JOBS if "gpt2" in job or job == "scaling"}


def plotter(path: Path, jobs: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    """A function that draws the rows of `scaling`, the share of the peak against each size, as a picture.

    Raises UserError, before anything is measured, if there will be no such rows or no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    if "scaling" not in jobs:
        raise UserError("--plot draws the rows of the job scaling: bench scaling --plot FILE")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: a picture's name ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")

    def draw(rows: Sequence[Row]) -> None:
        figure, shares = Figure(figsize=(10, 3.2), layout="constrained"), {}
        for row in rows:
            shares[row["job"]] = row["share_of_peak"]
        for (axis, sizes), panel in zip(SCALING.items(), figure.subplots(1, 3, sharey=True), strict=True):
            for threads in THREADS:
                line = [shares[f"scaling/{axis}={n}/{threads}"] for n in sizes]
                panel.plot(sizes, line, marker="o", label=f"threads: {threads}")
            others = ", ".join(f"{name} {size}" for name, size in BASE.items() if name != axis)
            panel.set(xscale="log", xlabel=f"{axis} ({others})", ylim=(0, None))
            panel.set_xticks(sizes, sizes, minor=False)
            panel.minorticks_off()
            panel.legend()
        figure.axes[0].set_ylabel("training step, share of FMA peak")
        figure.savefig(path)

    return draw
