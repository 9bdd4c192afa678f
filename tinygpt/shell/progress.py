"""The progress line of a training, and texts that several commands print."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from pathlib import Path

from ..lab import texts
from .terminal import can_renew, renew, say

SHOWN = ("train_loss", "reward", "gold", "kl", "entropy", "distinct", "val_right", "val_right_known",
         "val_false_never", "val_loss", "val_floor", "tokens_per_s")  # of a record
# RLHF's loss is always near 0. The text of val_floor has val_loss too.
HIDDEN_BY = {"train_loss": "reward", "val_loss": "val_floor"}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def progress(max_iters: int, language: str = texts.LANGUAGES[0]) -> Callable[[dict], None]:
    """A report for `train.train`. A terminal gets one line that changes; a file gets about 20 lines."""
    say_in, renews, every = partial(texts.text, language), can_renew(), max(1, max_iters // 20)
    first, start, last = None, time.perf_counter(), 0.0

    def report(record: dict) -> None:
        nonlocal first, last
        n, now = record["iter"], time.perf_counter()
        first = n - 1 if first is None else first
        left = clock((now - start) / (n - first) * (max_iters - n))
        names = (name for name in SHOWN if name in record and HIDDEN_BY.get(name) not in record)
        numbers = [say_in(f"progress {name}", **record) for name in names]
        at, evaluated = f"{n:{len(str(max_iters))}}/{max_iters}", "val_loss" in record
        text = "  ".join([at, *numbers, say_in("progress left", time=left)])
        if not renews:
            if evaluated or n % every == 0:
                say(text)
        elif evaluated or n == max_iters:
            renew(text, nl=True)
        elif now - last > 0.1:
            last, done = now, 20 * n // max_iters
            renew(text, before=f"[{'#' * done}{'-' * (20 - done)}] ")

    return report


def command(*words: str) -> str:
    """A command for the user to type. It starts with a path if the shell does not know the name tinygpt."""
    called = Path(sys.argv[0])
    unknown = called.name == "tinygpt" and not shutil.which("tinygpt")
    return shlex.join([str(called) if unknown else "tinygpt", *words])


def data_options(paths: Iterable[str]) -> list[str]:
    return [word for path in paths for word in ("--data", path)]


def shown_token(token: bytes) -> str:
    """A token as text. Parts of characters, and characters that cannot be printed, are bytes: <ea b0>."""
    text = token.decode("utf-8", "surrogateescape").replace(" ", "\u2423")
    texts = ["".join(run) if whole else "".join(run).encode("utf-8", "surrogateescape").hex(" ").join("<>")
             for whole, run in groupby(text, str.isprintable)]  # fmt: skip
    return "".join(texts)
