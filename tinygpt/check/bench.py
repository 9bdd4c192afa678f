"""How fast this machine runs tinygpt, and what share that is of what the machine can do.

A job is measured in a process of its own: a warm-up, then steps for some seconds, of which the median counts.
The machine's peak (multiply-adds in registers) and its memory's bandwidth are measured by the same C core,
with the same threads, just before. A training step's operations are counted as

    6 x parameters x tokens  +  6 x layers x channels x T x tokens

(the tied table once; attention's causal half), a token's generation as one read of all weights for each step.
A generation is timed as a whole, its prompt included, and divided by the new tokens. In bfloat16 the peak is
still that of float32.
`numpy/nano` is nano's training step on the NumPy backend. `lora/SIZE` is a training step of LoRA, rank 8 at
all projections, beside a base of which no gradient is computed: 4 x parameters x tokens. `rlhf/small` is an
update of RLOO: 64 answers of 16 tokens are sampled, scored by their length, and learned from. `scaling`
varies one size of a training step at a time, with one thread and with all.

Not here: other libraries; tests/peers/bench.py puts these figures beside theirs.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
GEMM = [
    (768, 768, 768), (1024, 3072, 768), (768, 384, 128), (768, 128, 512), (2048, 1024, 256),
    (2048, 2048, 2048), (256, 50304, 768),
]  # fmt: skip

SCALING = {  # one of these at a time, the others as in BASE
    "T": (64, 128, 256, 512, 1024),
    "C": (64, 128, 192, 256, 384, 512, 768),
    "B": (1, 2, 4, 8, 16, 32, 64),
}
BASE = {"T": 128, "C": 256, "B": 8}

JOBS = [
    "peak", "gemm", *(f"train/{size}" for size in TRAIN), "numpy/nano", *(f"lora/{size}" for size in LORA),
    *(f"rlhf/{size}" for size in RLHF), "scaling",
    *(f"generate/{size}/{batch}" for size, batches in GENERATE.items() for batch in batches),
]  # fmt: skip
SLOW = {job for job in JOBS if "gpt2" in job or job == "scaling"}

Row = dict[str, object]


def run(jobs: list[str], seconds: float = 5.0, dtype: str = "float32") -> Iterator[Row]:
    """A row for each job, in order; without names, for all but the slowest. dtype: see GPT.compute_in.

    A row has job, ms (the median of a step; for batch 1, of a token), tokens_per_s, gflops, share_of_peak (of
    the multiply-adds), gb_per_s, share_of_bandwidth and peak_rss_mib, each None where it has no meaning.
    Raises UserError for a name that is not a job.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds is {seconds}: it must be more than 0")
    for job in jobs:
        if job not in JOBS:
            raise UserError(f"{job}: not a job; there are {', '.join(JOBS)}")
    if "c" not in kernels.available():
        raise UserError("bench measures the C core, which is not built here")
    for job in jobs or [job for job in JOBS if job not in SLOW]:
        parts = {job: None}  # with their number of threads
        if job == "scaling":
            parts = {f"scaling/{axis}/{n}": n for axis in SCALING for n in sorted({1, kernels.processors()})}
        for part, threads in parts.items():
            limits = _apart("machine", min(1.0, seconds / 4), threads)
            yield from _apart("_measure", part, dtype, seconds, *limits)


_CALL = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tinygpt.check import bench
print(json.dumps(getattr(bench, sys.argv[2])(*json.loads(sys.argv[3]))))"""


def _apart(function: str, *args):
    """What a function of this module returns in a new process: it has memory and threads of its own."""
    command = [sys.executable, "-c", _CALL, json.dumps(sys.path), function, json.dumps(args)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UserError(f"the process that measures has failed ({reason})")
    return json.loads(result.stdout)


def _measure(job: str, dtype: str, seconds: float, peak: float, bandwidth: float) -> list[Row]:
    GPT.bfloat16 = dtype == "bfloat16"  # of all models: the process is of this job alone
    kind, *rest = job.split("/")
    if kind == "peak":
        return [_row(job, None, None, peak, peak, bandwidth, bandwidth)]
    if kind == "gemm":
        return [_gemm(shape, peak, seconds / len(GEMM)) for shape in GEMM]
    if kind == "scaling":
        return [_scaling(rest[0], size, int(rest[1]), peak, seconds / 4) for size in SCALING[rest[0]]]
    if kind in ("train", "numpy", "lora"):
        B, T = TRAIN[rest[0]]
        adapter = AdapterConfig("lora") if kind == "lora" else None
        step, tokens, flops = _training(PRESETS[rest[0]], B, T, ops if kind == "numpy" else None, adapter)
        ms = median_ms(step, seconds)
        return [_row(job, ms, tokens, flops / ms * 1e3, peak)]
    if kind == "rlhf":
        prompts, answers, _, tokens = RLHF[rest[0]]
        return [_row(job, median_ms(_rloo(rest[0]), seconds), prompts * answers * tokens)]
    step, weights = _generation(rest[0], batch := int(rest[1]))
    ms = median_ms(step, seconds) / NEW
    return [_row(job, ms, batch, 2 * weights * batch / ms * 1e3, peak, 4 * weights / ms * 1e3, bandwidth)]


def _row(job, ms, tokens, flops=None, peak=None, bytes_per_s=None, bandwidth=None) -> Row:
    return {
        "job": job,
        "ms": ms and round(ms, 4),
        "tokens_per_s": tokens and round(tokens / ms * 1e3, 1),
        "gflops": flops and round(flops / 1e9, 1),
        "share_of_peak": flops and round(flops / peak, 3),
        "gb_per_s": bytes_per_s and round(bytes_per_s / 1e9, 1),
        "share_of_bandwidth": bytes_per_s and round(bytes_per_s / bandwidth, 3),
        "peak_rss_mib": _peak_rss(),
    }


def _peak_rss() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def median_ms(step: Callable[[], object], seconds: float) -> float:
    """Calls `step` twice, then for some seconds (three times at least): the median of its times, in ms."""
    times = []
    for _ in range(2):
        step()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def machine(seconds: float = 1.0, threads: int | None = None) -> tuple[float, float]:
    """Operations a second in float32 (a multiply-add is two), and bytes a second read from memory.

    The best of many tries, as both are limits. threads: None leaves their number as it is.
    """
    if threads:
        kernels.set_threads(threads)
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


def _rloo(size: str) -> Callable[[], object]:
    """An update of RLOO, all of it: the exact KL that is reported too."""
    rng, config = np.random.default_rng(0), dataclasses.replace(PRESETS[size], block_size=128)
    model, (prompts, answers, length, new) = GPT(config, rng), RLHF[size]
    optimizer, spoken = AdamW(model), rng.integers(3, config.vocab_size, (prompts, length)).astype(np.int32)
    tokens = SimpleNamespace(stops={2}, special={}, vocab_size=config.vocab_size,
                             decode=lambda ids: str(ids.tolist()))  # fmt: skip
    how = rlhf.Config(num_prompts=prompts, num_generations=answers, max_new_tokens=new)
    learner = rlhf.Trainer(
        optimizer, model.copy(), tokens, how, [(str(n), ids) for n, ids in enumerate(spoken)],
        lambda questions, replies: np.array([float(len(text)) for text in replies]),
    )  # fmt: skip

    def step() -> None:
        learner.compute(learner.update(optimizer.steps, rng), rng)
        optimizer.step(1e-5)

    return step


def _gemm(shape: tuple[int, int, int], peak: float, seconds: float) -> Row:
    M, N, K = shape
    rng = np.random.default_rng(0)
    a, b = (memory.empty(s, np.float32) for s in ((M, K), (K, N)))
    a[:], b[:] = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    out = memory.empty((M, N), np.float32)
    ms = median_ms(lambda: kernels.gemm(a, b, out=out, bfloat16=GPT.bfloat16), seconds)
    return _row(f"gemm/{M}x{N}x{K}", ms, None, 2 * M * N * K / ms * 1e3, peak)


def _scaling(axis: str, size: int, threads: int, peak: float, seconds: float) -> Row:
    kernels.set_threads(threads)
    sizes = BASE | {axis: size}
    config = GPTConfig(1024, sizes["T"], n_layer=4, n_head=sizes["C"] // 64, n_embd=sizes["C"])
    step, tokens, flops = _training(config, sizes["B"], sizes["T"])
    ms = median_ms(step, seconds)
    return _row(f"scaling/{axis}={size}/{threads}", ms, tokens, flops / ms * 1e3, peak)


def _training(
    config: GPTConfig, B: int, T: int, backend: ModuleType | None = None,
    adapter: AdapterConfig | None = None,
) -> tuple[Callable[[], object], int, int]:  # fmt: skip
    """A training step, its tokens, its operations."""
    config = dataclasses.replace(config, block_size=T)
    rng = np.random.default_rng(0)
    model = GPT(config, rng, ops=backend)
    model = create(model, adapter, rng) if adapter else model
    optimizer = AdamW(model)
    ids, targets = rng.integers(0, config.vocab_size, (2, B, T)).astype(np.int32)
    compute = gradients(optimizer)
    batch = Batch(ids, targets, np.full((B, T), 1 / (B * T), np.float32))

    def step() -> None:
        compute([batch])
        optimizer.step(1e-3)

    attention = 6 * config.n_layer * config.n_embd * T
    size = model.flat.size - model.params["wpe.weight"].size  # a position's row is looked up
    weights = 4 * size + 6 * model.trained.flat.size if adapter else 6 * size
    return step, B * T, (weights + attention) * B * T


def _generation(size: str, batch: int) -> tuple[Callable[[], object], int]:
    """Sampling NEW tokens for each of `batch` prompts, and the number of weights that a step reads."""
    rng = np.random.default_rng(0)
    model = GPT(dataclasses.replace(PRESETS[size], block_size=max(CONTEXT, PRESETS[size].block_size)), rng)
    prompts = list(rng.integers(0, model.config.vocab_size, (batch, PROMPT)).astype(np.int32))
    read = model.flat.size - model.params["wpe.weight"].size
    return lambda: generate(model, prompts, NEW, rng=rng), read


def plotter(path: Path, jobs: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    """A function that draws the rows of `scaling`, the share of the peak against each size, as a picture.

    Raises UserError, before anything is measured, where there will be no such rows or no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    if "scaling" not in jobs:
        raise UserError("--plot draws what the job scaling finds: bench scaling --plot FILE")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: a picture's name ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")

    def draw(rows: Sequence[Row]) -> None:
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axis, panel in zip(SCALING, figure.subplots(1, len(SCALING), sharey=True), strict=True):
            lines: dict[str, list] = {}
            for row in rows:
                if row["job"].startswith(f"scaling/{axis}="):
                    _, size, threads = row["job"].split("/")
                    lines.setdefault(threads, []).append((int(size[2:]), row["share_of_peak"]))
            for threads, points in lines.items():
                panel.plot(*zip(*points, strict=True), marker="o", label=f"threads: {threads}")
            others = ", ".join(f"{name} {size}" for name, size in BASE.items() if name != axis)
            panel.set(xscale="log", xlabel=f"{axis} ({others})", ylim=(0, None))
            panel.set_xticks(SCALING[axis], SCALING[axis], minor=False)
            panel.minorticks_off()
            panel.legend()
        figure.axes[0].set_ylabel("training step, share of FMA peak")
        figure.savefig(path)

    return draw
