"""The training loop of all stages.

    for each update:  gradients of loss = sum(weights * nll) over the batches;  clip;  AdamW;  a record

The loop prints nothing: it gives each record to a callback. The random numbers of update n come from
`default_rng([seed, n])`. So a run that was interrupted continues with the same numbers, no state of a
generator is saved, and an evaluation does not change the run.

Several processes share the batches of an update and exchange gradients and weights (`parallel`).

Not here: the source of the batches (`stages`), the files of a run (`folders`).
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
from numpy.random import Generator

from ..errors import UserError
from .config import DTYPES
from .model import GPT
from .optim import AdamW, learning_rate
from .option import check_options, option
from .parallel import ALONE, Group, left_size
from .replay import recorded

Array = np.ndarray
Record = dict[str, float]  # the numbers of one update by name


class Batch(NamedTuple):
    """Sequences, and the weight of each target. The weights of an update usually sum to 1."""

    ids: Array  # (B, T) int32
    targets: Array  # (B, T) int32
    weights: Array  # (B, T); 0 masks
    start: Array | None = None  # (B, T): the first key that each query sees, see ops.visible_keys
    positions: Array | None = None  # (B, T)

    def at(self, places: Array | slice) -> "Batch":
        """Some of the sequences."""
        return Batch(*(field if field is None else field[places] for field in self))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run, under nanoGPT's names. Raises UserError for a value out of range."""

    max_iters: int = option(4000, "[1, inf)", "Updates of weights.")
    learning_rate: float = option(1e-3, "(0, inf)", "The highest learning rate.")
    min_lr: float = option(1e-4, "[0, inf)", "The learning rate at the end.", shown="a tenth of the highest")
    warmup_iters: int = option(100, "[0, inf)", "Updates in which the learning rate rises.")
    weight_decay: float = option(0.1, "[0, inf)", "Weight decay of matrices.")
    beta1: float = option(0.9, "[0, 1)", "Decay of the mean of gradients (AdamW).")
    beta2: float = option(0.99, "[0, 1)", "Decay of the mean of squared gradients (AdamW).")
    grad_clip: float = option(1.0, "[0, inf)", "Largest norm of the gradient; 0: no limit.")
    eval_interval: int = option(1000, "[1, inf)", "Updates from one evaluation, and save, to the next.")
    seed: int = option(1337, "[0, inf)", "Seed of weights, batches and dropout.")
    dtype: str = option("float32", DTYPES, "Format of the operands of linear maps; all else is float32.")
    merge_every: int = option(0, "[0, inf)", "Updates between merges of LoRA's branches; 0: never.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr is {self.min_lr}: it is at most learning_rate, {self.learning_rate}")

    def learning_rate_at(self, n: int) -> float:
        """The learning rate of update n, counted from 0.

        After a merge of LoRA's branches the rate climbs again, for a tenth of the updates to the next merge.
        """
        fields = {"warmup_iters": self.warmup_iters, "max_iters": self.max_iters}
        rate = learning_rate(n, peak=self.learning_rate, lowest=self.min_lr, **fields)
        since, climb = (n % self.merge_every, self.merge_every // 10) if self.merge_every else (n, 0)
        return rate * (since + 1) / (climb + 1) if since < min(climb, n) else rate

    def optimizer(self, model: GPT, names: Iterable[str] | None = None, group: Group = ALONE) -> AdamW:
        """An optimizer with these settings for the parameters `names` of a model; None: all parameters."""
        fields = ("beta1", "beta2", "weight_decay", "grad_clip")
        return AdamW(model, names, group=group, **{field: getattr(self, field) for field in fields})


class NonFiniteError(UserError):
    """Training stopped because the loss, the gradient or an evaluation is infinite or NaN."""


def train(
    optimizer: AdamW, batches: Callable[[int, Generator], Sequence[Batch]], config: TrainConfig, *,
    evaluate: Callable[[], Record] = dict, report: Callable[[Record], None] = lambda record: None,
    save: Callable[[], None] = lambda: None, elapsed_s: float = 0.0, compute: Callable | None = None,
) -> None:  # fmt: skip
    """Trains the model of `optimizer` until it has made config.max_iters updates.

    - batches(n, rng): the batches of update n, counted from 0; their gradients are added up
    - compute(batches, rng): writes the gradients into `optimizer.flat`, and returns the loss, or a record
      with the loss as train_loss; None: `gradients(optimizer)`
    - report(record): receives the record of each update: iter (counted from 1), train_loss, lr, grad_norm,
      tokens_per_s, and elapsed_s, the seconds of this call plus the argument elapsed_s
    - evaluate(): more numbers for the record, every eval_interval updates and after the last update
    - save(): is called after each evaluation

    On Ctrl-C, SIGTERM or SIGHUP the loop completes the update, calls `save` and raises KeyboardInterrupt. An
    OSError or a UserError of `report` is raised after `save`, too. In a group all processes do so at the same
    update, even if only one process has the signal or the error.

    Raises NonFiniteError if the loss, the norm of the gradient or an evaluation is not finite. Such a loss or
    gradient changes no weight, and after such an evaluation nothing is saved.
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
            except (OSError, UserError) as error:  # the reader of a pipe is gone, or the disk is full
                failure = error
            stop, broken = group.agree(interrupted, failure)
            if due or stop or broken:
                save()
                last_save = n
            if broken:
                group.meet()  # the error of one process would end process 0 in its save
                raise failure or UserError("another process failed")
            if stop:
                raise KeyboardInterrupt


def gradients(optimizer: AdamW) -> Callable:
    """A function compute(batches, rng): the loss, in nats, summed over the batches. Its gradients are then in
    `optimizer.flat`. rng draws dropout; None: no dropout.

    Losses are sums, not means, so the result is that of one large batch. From the second batch of a shape,
    forward and backward are replayed (`replay`).
    """
    model = optimizer.model
    plain = partial(model.loss, grads=optimizer.grads)
    replayed = recorded(plain, model, optimizer.flat)

    def compute(batches: Sequence[Batch], rng: Generator | None = None) -> float:
        loss = partial(plain, rng=rng) if rng is not None and model.draws else replayed
        return accumulate(optimizer.flat, lambda batch: float(loss(**loss_arguments(batch))), batches)

    return compute


def accumulate(flat: Array, compute: Callable[[object], float], batches: Sequence) -> float:
    """The sum of the losses of the batches. The sum of their gradients is then in `flat`.

    compute(batch): writes the gradients of one batch into `flat`, and returns its loss. Losses and gradients
    are added in the order of a binary tree over the batches, see `parallel`.
    """
    if not batches:
        flat[:] = 0
        return 0.0
    if len(batches) == 1:
        return compute(batches[0])
    cut = left_size(len(batches))
    left = accumulate(flat, compute, batches[:cut])
    left_flat = flat.copy()
    right = accumulate(flat, compute, batches[cut:])
    flat += left_flat
    return left + right


def mean_loss(model: GPT, batches: Iterable[Batch], group: Group = ALONE) -> float:
    """The weighted mean of -log p(target) over all batches, in nats, without dropout. 0 if all weights are 0.

    The processes of a group take turns with the batches. All return the same mean.
    """
    sums = [(0.0, 0.0)]
    for n, batch in enumerate(batches):
        is_mine = n % group.size == group.rank
        loss = float(model.loss(**loss_arguments(batch))) if is_mine else 0.0
        sums.append((loss, float(batch.weights.sum(dtype=np.float64)) if is_mine else 0.0))
    total, count = group.combine(np.array(sums)).cumsum(0)[-1]  # np.sum adds in another order
    return float(total / max(count, 1e-30))


def loss_arguments(batch: Batch) -> dict[str, Array | None]:
    """A batch as arguments of `GPT.loss`, with `places` for the targets whose weight is not 0.

    The number of places is rounded up to a multiple of a sixteenth of the batch, with places of weight 0. So
    batches have few shapes: `replay` keeps a tape for each shape. `places` is None if that makes all places.
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
    """norm(after - before) / norm(before): of all weights together, and of each array by name.

    before, after: name -> array. The change of an array of zeros is infinity, or 0 if it stays zero.
    """
    change = {name: float(np.square(after[name] - p).sum(dtype=np.float64)) for name, p in before.items()}
    size = {name: float(np.square(p).sum(dtype=np.float64)) for name, p in before.items()}

    def ratio(a: float, b: float) -> float:
        return math.sqrt(a / b) if b else math.inf if a else 0.0

    return ratio(sum(change.values()), sum(size.values())), {n: ratio(change[n], size[n]) for n in before}


def _check_finite(value: float, what: str, n: int, last_save: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} is {value} at iteration {n}; the model of iteration {last_save} is kept. "
            "Try a lower learning rate, a longer warm-up, or gradient clipping"
        )


@contextlib.contextmanager
def _first_interrupt_waits() -> Iterator[list]:
    """Yields a list for the first signal to stop: Ctrl-C, SIGTERM, or SIGHUP when a terminal closes.

    The second signal raises KeyboardInterrupt at once. A signal that is ignored (nohup) stays ignored.
    """
    signals, before = [], {}

    def note(number: int, frame: object) -> None:
        signals.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():  # Python runs handlers in the main thread only
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
