"""The one training loop: every stage gives it batches, and it makes updates from them.

    for each update:  gradients of loss = sum(weights * nll) over the batches;  clip;  AdamW;  a record

It reports through a callback and prints nothing. The random numbers of update n come from a generator made
from (seed, n): a run that was interrupted continues with the very numbers it would have had, nothing needs to
be stored for that, and evaluating or sampling on the way does not change the run.

Several processes share the batches of an update and then exchange gradients and weights (`parallel`).

Not here: where batches come from, what is saved and where.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .config import DTYPES
from .model import GPT
from .optim import AdamW, learning_rate
from .option import check_options, option
from .parallel import ALONE, Group, left_size
from .replay import recorded

Array = np.ndarray
Record = dict[str, float]  # what a report tells of one update


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

    max_iters: int = option(4000, "[1, inf)", "Updates of weights.")
    learning_rate: float = option(1e-3, "(0, inf)", "At its highest.")
    min_lr: float = option(1e-4, "[0, inf)", "At the end.", shown="a tenth of it")
    warmup_iters: int = option(100, "[0, inf)", "On the way up.")
    weight_decay: float = option(0.1, "[0, inf)", "Of matrices.")
    beta1: float = option(0.9, "[0, 1)", "Of the mean of gradients.")
    beta2: float = option(0.99, "[0, 1)", "Of the mean of their squares.")
    grad_clip: float = option(1.0, "[0, inf)", "Largest norm; 0: any.")
    eval_interval: int = option(1000, "[1, inf)", "Updates from one evaluation, and save, to the next.")
    seed: int = option(1337, "[0, inf)", "Of weights, batches and dropout.")
    dtype: str = option("float32", DTYPES, "Of what linear maps multiply; all else stays float32.")
    merge_every: int = option(
        0, "[0, inf)", "Updates after which LoRA's branches join the weights and begin anew; 0: never."
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.min_lr > self.learning_rate:
            rule = f"at most the learning rate, {self.learning_rate}"
            raise UserError(f"min_lr is {self.min_lr}: it must be {rule}")

    def learning_rate_at(self, n: int) -> float:
        """Of update n, counted from 0. After a merge it climbs anew, for a tenth of the time to the next."""
        fields = {"warmup_iters": self.warmup_iters, "max_iters": self.max_iters}
        rate = learning_rate(n, peak=self.learning_rate, lowest=self.min_lr, **fields)
        since, climb = (n % self.merge_every, self.merge_every // 10) if self.merge_every else (n, 0)
        return rate * (since + 1) / (climb + 1) if since < min(climb, n) else rate

    def optimizer(self, model: GPT, names: Iterable[str] | None = None, group: Group = ALONE) -> AdamW:
        """An optimizer with these settings for the parameters `names` of a model, all if None."""
        fields = ("beta1", "beta2", "weight_decay", "grad_clip")
        return AdamW(model, names, group=group, **{field: getattr(self, field) for field in fields})


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
    Several processes do all this at the same update, whichever of them got the signal or the error.

    compute(batches, rng) puts gradients into `optimizer.flat` and returns the loss, or a record with the loss
    as train_loss; by default it is `gradients(optimizer)`.

    Raises NonFiniteError, before the update or the save in question.
    """
    compute, group = compute or gradients(optimizer), optimizer.group
    origin, last_save = time.perf_counter() - elapsed_s, optimizer.steps
    with _first_interrupt_waits() as interrupted, np.errstate(over="ignore", invalid="ignore"):
        while optimizer.steps < config.max_iters:
            start, rng = time.perf_counter(), np.random.default_rng([config.seed, optimizer.steps])
            todo = batches(optimizer.steps, rng)
            losses = compute(group.share(todo, rng, optimizer.model.draws), rng)
            losses = losses if isinstance(losses, dict) else {"train_loss": losses}
            losses["train_loss"] = group.reduce(optimizer.flat, optimizer.bounds, losses["train_loss"])
            _check_finite(losses["train_loss"], "loss", optimizer.steps + 1, last_save)
            lr = config.learning_rate_at(optimizer.steps)
            norm = optimizer.step(lr)
            _check_finite(norm, "gradient's norm", optimizer.steps + 1, last_save)
            n, seconds = optimizer.steps, max(time.perf_counter() - start, 1e-9)  # a clock may stand still
            rate = round(sum(batch.ids.size for batch in todo) / seconds, 1)
            record = {"iter": n, **losses, "lr": lr, "grad_norm": norm, "tokens_per_s": rate}

            due = n % config.eval_interval == 0 or n == config.max_iters
            evaluation = evaluate() if due else {}
            for name, value in evaluation.items():
                _check_finite(value, name, n, last_save)
            failure = None
            try:
                report(record | {"elapsed_s": round(time.perf_counter() - origin, 3)} | evaluation)
            except (OSError, UserError) as error:  # nobody reads the output any more; the disk is full
                failure = error
            stop, broken = group.agree(interrupted, failure)
            if due or stop or broken:
                save()
                last_save = n
            if broken:
                raise failure or UserError("another process failed")
            if stop:
                raise KeyboardInterrupt


def gradients(optimizer: AdamW) -> Callable:
    """A function compute(batches, rng): it puts the gradients of the batches' summed loss into
    `optimizer.flat`, and returns the loss, in nats. rng turns dropout on.

    As the losses are sums, not means, this is what one large batch would give. The forward and backward
    passes are replayed from the second batch of a shape on (`replay`).
    """
    model = optimizer.model
    plain = partial(model.loss, grads=optimizer.grads)
    replayed = recorded(plain, model, optimizer.flat)

    def compute(batches: Sequence[Batch], rng: np.random.Generator | None = None) -> float:
        loss = partial(plain, rng=rng) if rng is not None and model.draws else replayed
        return accumulated(optimizer.flat, lambda batch: float(loss(**counted(batch))), batches)

    return compute


def accumulated(flat: Array, compute: Callable[[object], float], batches: Sequence) -> float:
    """The sum of the losses of batches; that of their gradients is then in `flat`, where compute(batch) puts
    those of one batch. Both are added in a binary tree over the numbers of the batches, see `parallel`."""
    if not batches:
        flat[:] = 0
        return 0.0
    if len(batches) == 1:
        return compute(batches[0])
    cut = left_size(len(batches))
    left = accumulated(flat, compute, batches[:cut])
    gradients_of_left = flat.copy()
    right = accumulated(flat, compute, batches[cut:])
    flat += gradients_of_left
    return left + right


def mean_loss(model: GPT, batches: Iterable[Batch], group: Group = ALONE) -> float:
    """The weighted mean of -log p(target) over all batches, in nats, without dropout. The processes of a
    group take turns, and get the same mean."""
    sums = []
    for n, batch in enumerate(batches):
        own = n % group.size == group.rank
        loss = float(model.loss(**counted(batch))) if own else 0.0
        sums.append((loss, float(batch.weights.sum(dtype=np.float64)) if own else 0.0))
    total, count = group.combine(np.array([(0.0, 0.0), *sums])).cumsum(0)[-1]  # np.sum adds in another order
    return float(total / max(count, 1e-30))


def counted(batch: Batch) -> dict[str, Array | None]:
    """A batch as arguments of `GPT.loss`: `places`, `targets` and `weights` are those whose weight is not 0.

    Their number is rounded up to a multiple of a sixteenth of the batch: batches then have few shapes, and
    `replay` keeps a tape of each shape. The places that fill the rest have weight 0. Where all places count,
    `places` is None.
    """
    ids, targets, weights, start, positions = batch
    if positions is None:
        positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    places, at = None, np.flatnonzero(weights)
    unit = -(-weights.size // 16)
    if (N := -(-max(1, len(at)) // unit) * unit) < weights.size:
        places = np.zeros(N, np.int32)
        places[: len(at)] = at
        targets, weights = targets.ravel()[places], weights.ravel()[places]
        weights[len(at) :] = 0
    return {"ids": ids, "targets": targets, "weights": weights, "start": start, "positions": positions,
            "places": places}  # fmt: skip


def weight_change(before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[float, dict[str, float]]:
    """How far training moved the weights: norm(after - before) / norm(before), of all together and of each.

    before, after: name -> array. What was zero and is not has the change infinity.
    """
    moved = {name: float(np.square(after[name] - p).sum(dtype=np.float64)) for name, p in before.items()}
    old = {name: float(np.square(p).sum(dtype=np.float64)) for name, p in before.items()}

    def ratio(a: float, b: float) -> float:
        return math.sqrt(a / b) if b else math.inf if a else 0.0

    return ratio(sum(moved.values()), sum(old.values())), {n: ratio(moved[n], old[n]) for n in before}


def _check_finite(value: float, what: str, n: int, last_save: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} is {value} at iteration {n}; the model as of iteration {last_save} is kept. "
            "Try a lower learning rate, a longer warm-up, or gradient clipping"
        )


@contextlib.contextmanager
def _first_interrupt_waits() -> Iterator[list]:
    """Yields a list that is empty until a signal asks to stop: Ctrl-C, SIGTERM, or SIGHUP when a terminal
    closes. A second one raises KeyboardInterrupt on the spot. A signal that is ignored (nohup) stays so."""
    signals, before = [], {}

    def note(number: int, frame: object) -> None:
        signals.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():  # signals only ever reach the main thread
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
