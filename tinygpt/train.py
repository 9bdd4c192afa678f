"""The one training loop: every stage gives it batches, and it makes updates from them.

    for each update:  gradients of loss = sum(weights * nll) over the batches;  clip;  AdamW;  a record

It reports through a callback and prints nothing. The random numbers of update n come from a generator made
from (seed, n): a run that was interrupted continues with the very numbers it would have had, nothing needs to
be stored for that, and evaluating or sampling on the way does not change the run.

Not here: where batches come from, what is saved and where, several processes.
"""

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .atomic import replacing
from .errors import UserError
from .jsonfile import parse
from .model import GPT
from .optim import AdamW, learning_rate

Array = np.ndarray
Record = dict[str, float]  # what a report tells of one update
MOST_RECORDINGS = 16  # of shapes of batches, see `_loss`
MOST_RECORD, MOST_BYTES = 1 << 16, 1 << 30  # characters in a line of metrics.jsonl; bytes of the file


class Batch(NamedTuple):
    """Sequences, and how much each target counts: the weights of an update usually sum to 1."""

    ids: Array  # (B, T) int32
    targets: Array  # (B, T) int32
    weights: Array  # (B, T); 0 masks
    start: Array | None = None  # (B, T): where each query's view begins, see ops.visible_keys
    positions: Array | None = None  # (B, T)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train, under nanoGPT's names. Raises UserError for what cannot be."""

    max_iters: int = 4000
    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    warmup_iters: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # 0: none
    eval_interval: int = 1000
    seed: int = 1337
    merge_every: int = 0  # updates after which an adapter is merged and begins anew; 0: never

    def __post_init__(self) -> None:
        for name, right, rule in (  # comparisons that are false for NaN
            ("max_iters", self.max_iters >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "more than 0"),
            ("min_lr", 0 <= self.min_lr <= self.learning_rate, "from 0 to the learning rate"),
            ("warmup_iters", self.warmup_iters >= 0, "at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and less than 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and less than 1"),
            ("grad_clip", 0 <= self.grad_clip < math.inf, "at least 0, which is off"),
            ("eval_interval", self.eval_interval >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("merge_every", self.merge_every >= 0, "at least 0, which is off"),
        ):
            if not right:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")

    def learning_rate_at(self, n: int) -> float:
        """Of update n, counted from 0. After a merge it climbs anew, for a tenth of the time to the next."""
        fields = {"warmup_iters": self.warmup_iters, "max_iters": self.max_iters}
        rate = learning_rate(n, peak=self.learning_rate, lowest=self.min_lr, **fields)
        since, climb = (n % self.merge_every, self.merge_every // 10) if self.merge_every else (n, 0)
        return rate * (since + 1) / (climb + 1) if since < min(climb, n) else rate

    def optimizer(self, model: GPT, names: Iterable[str] | None = None) -> AdamW:
        """An optimizer with these settings for the parameters `names` of a model, all if None."""
        fields = ("beta1", "beta2", "weight_decay", "grad_clip")
        return AdamW(model, names, **{field: getattr(self, field) for field in fields})


class NonFiniteError(UserError):
    """Training stopped before an update because a number in it was infinite or not a number."""


def train(
    optimizer: AdamW,
    batches: Callable[[int, np.random.Generator], Sequence[Batch]],
    config: TrainConfig,
    *,
    evaluate: Callable[[], Record] = dict,
    report: Callable[[Record], None] = lambda record: None,
    save: Callable[[], None] = lambda: None,
    elapsed_s: float = 0.0,
    compute: Callable | None = None,
) -> None:
    """Updates the optimizer's model, from update `optimizer.steps` on, until config.max_iters are made.

    batches(n, rng) gives the batches of update n (from 0): one, or several whose gradients are added up.
    `report` gets a record of each update: iter (from 1), train_loss, lr, grad_norm, tokens_per_s, elapsed_s
    (to which the argument is added), and every eval_interval updates and after the last what `evaluate`
    returns. `save` is called after each such report. On Ctrl-C, SIGTERM or SIGHUP `save` is called when the
    update is done, and KeyboardInterrupt is raised. Where `report` raises an OSError, `save` is called first.

    compute(optimizer, batches, rng) puts gradients into `optimizer.flat` and returns the loss, or a
    record with it as train_loss; by default it is `accumulate`.

    Raises NonFiniteError, before the update or the save in question.
    """
    compute = compute or accumulate
    began, saved = time.perf_counter() - elapsed_s, optimizer.steps
    with _first_interrupt_waits() as interrupted, np.errstate(over="ignore", invalid="ignore"):
        while optimizer.steps < config.max_iters:
            record = _update(optimizer, batches, config, compute, saved)
            n = optimizer.steps
            due = n % config.eval_interval == 0 or n == config.max_iters
            found = evaluate() if due else {}
            for name, value in found.items():
                _check_finite(value, name, n, saved)
            closed = None
            try:
                report(record | {"elapsed_s": round(time.perf_counter() - began, 3)} | found)
            except (OSError, UserError) as error:  # nobody reads the output any more; the disk is full
                closed = error
            if due or interrupted or closed:
                save()
                saved = n
            if closed:
                raise closed
            if interrupted:
                raise KeyboardInterrupt


def _update(
    optimizer: AdamW, batches: Callable, config: TrainConfig, compute: Callable, saved: int
) -> Record:
    n, began = optimizer.steps, time.perf_counter()
    rng = np.random.default_rng([config.seed, n])
    todo = batches(n, rng)
    found = compute(optimizer, todo, rng)
    found = found if isinstance(found, dict) else {"train_loss": found}
    _check_finite(found["train_loss"], "loss", n + 1, saved)
    lr = config.learning_rate_at(n)
    norm = optimizer.step(lr)
    _check_finite(norm, "gradient's norm", n + 1, saved)
    seconds = max(time.perf_counter() - began, 1e-9)  # a clock may stand still
    rate = sum(batch.ids.size for batch in todo) / seconds
    return {"iter": n + 1, **found, "lr": lr, "grad_norm": norm, "tokens_per_s": round(rate, 1)}


def accumulate(
    optimizer: AdamW, batches: Sequence[Batch], rng: np.random.Generator | None = None
) -> float:
    """Puts the gradients of the batches' summed loss into `optimizer.flat`; returns that loss, in nats.

    As the losses are sums, not means, this is what one large batch would give. rng: turns dropout on.
    """
    loss, total = 0.0, np.zeros_like(optimizer.flat) if len(batches) > 1 else None
    for batch in batches:
        loss += _loss(optimizer, batch, rng)
        if total is not None:
            total += optimizer.flat
    if total is not None:
        optimizer.flat[:] = total
    return loss


def _loss(optimizer: AdamW, batch: Batch, rng: np.random.Generator | None) -> float:
    """The loss of a batch, its gradients in `optimizer.flat`.

    With the C core the calls that the first batch of a shape makes are recorded, and later ones are made from
    the recording: Python's part of a small model's step is a tenth of its time. Dropout has other seeds in
    each step and is not recorded; nor is a batch of odd shapes, or with ids out of range, which the model
    names; nor a model that computes anything in NumPy, such as a learned prompt.
    """
    model, ids = optimizer.model, batch.ids
    if batch.positions is None:
        batch = batch._replace(positions=np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))
    key = optimizer.flat.ctypes.data, model.config, ids.shape, tuple(a is not None for a in batch)
    dropout = rng is not None and model.draws
    if dropout or not _is_usual(model, batch) or optimizer.recordings.get(key) is False:
        more = {"start": batch.start, "positions": batch.positions, "rng": rng}
        return model.loss(*batch[:3], optimizer.grads, **more)
    if key in optimizer.recordings:
        held, recording = optimizer.recordings[key]
        for mine, new in zip(held, batch, strict=True):
            if mine is not None:
                mine[:] = new
        recording.replay()
    else:
        types = np.int32, np.int32, model.flat.dtype, np.int32, np.int32
        copies = (a if a is None else np.array(a, t, order="C") for a, t in zip(batch, types, strict=True))
        held = Batch(*copies)
        more = {"start": held.start, "positions": held.positions}
        inputs = [a for a in (*held, model.flat, model.trained.flat, optimizer.flat) if a is not None]
        recording = model.ops.Recording(lambda: model.losses(*held[:3], optimizer.grads, **more), inputs)
        optimizer.recordings[key] = (held, recording) if recording.is_whole else False
        if len(optimizer.recordings) > MOST_RECORDINGS:
            del optimizer.recordings[next(iter(optimizer.recordings))]
    return float((recording.result * held.weights).sum(dtype=np.float64))


def _is_usual(model: GPT, batch: Batch) -> bool:
    """Whether a replay can take this batch: all shapes alike, all numbers within their tables."""
    below = (model.config.vocab_size, model.config.vocab_size, None, math.inf, model.context)
    usual = batch.ids.size and hasattr(model.ops, "Recording") and batch.weights.shape == batch.ids.shape
    for a, most in zip(batch, below, strict=True):
        if usual and a is not None and most is not None:
            usual = a.shape == batch.ids.shape and a.dtype.kind in "iu" and a.min() >= 0 and a.max() < most
    return bool(usual)


def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """The weighted mean of -log p(target) over all batches, in nats, without dropout."""
    total, count = 0.0, 0.0
    for ids, targets, weights, start, positions in batches:
        total += model.loss(ids, targets, weights, start=start, positions=positions)
        count += float(weights.sum(dtype=np.float64))
    return total / max(count, 1e-30)


def weight_change(before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[float, dict[str, float]]:
    """How far training moved the weights: norm(after - before) / norm(before), of all together and of each.

    before, after: name -> array. What was zero and is not has the change infinity.
    """
    moved = {name: float(np.square(after[name] - p).sum(dtype=np.float64)) for name, p in before.items()}
    old = {name: float(np.square(p).sum(dtype=np.float64)) for name, p in before.items()}

    def ratio(a: float, b: float) -> float:
        return math.sqrt(a / b) if b else math.inf if a else 0.0

    return ratio(sum(moved.values()), sum(old.values())), {n: ratio(moved[n], old[n]) for n in before}


def _check_finite(value: float, what: str, n: int, saved: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} is {value} at iteration {n}; the model as of iteration {saved} is kept. "
            "Try a lower learning rate, a longer warm-up, or gradient clipping"
        )


@contextlib.contextmanager
def _first_interrupt_waits() -> Iterator[list]:
    """Yields a list that is empty until a signal asks to stop: Ctrl-C, SIGTERM, or SIGHUP when a terminal
    closes. A second one raises KeyboardInterrupt on the spot. A signal that is ignored (nohup) stays so."""
    pressed, before = [], {}

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():  # signals only ever reach the main thread
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def resume_metrics(path: Path, step: int) -> Record:
    """Cuts a file of records back to those of the first `step` updates, and returns the last, {} if none."""
    last = {}
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as new:
        for line in _lines(path):
            # A kill cuts a line short; whatever else is not a record of `train` goes too.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = parse(line)
                if record["iter"] <= step and type(record["elapsed_s"]) is float:
                    new.write(json.dumps(record) + "\n")
                    last = record
    return last


def _lines(path: Path) -> Iterator[str]:
    """The lines of a regular file; a line of more than a record's length comes in parts."""
    if path.is_file():
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES:,} bytes: move it away, and the run goes on")
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MOST_RECORD):
                yield line
