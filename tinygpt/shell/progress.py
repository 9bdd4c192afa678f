"""What a person sees while a model trains, and sentences that several commands print."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from .terminal import can_renew, renew, say

WATCHED = ("reward", "gold", "kl", "entropy", "distinct", "val_right", "val_right_known", "val_false_never")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def progress(max_iters: int) -> Callable[[dict], None]:
    """A report for `train.train`: on a terminal a line that renews itself, else a line now and then."""
    renews, every = can_renew(), max(1, max_iters // 20)
    first, began, shown = None, time.perf_counter(), 0.0

    def report(record: dict) -> None:
        nonlocal first, shown
        n, now = record["iter"], time.perf_counter()
        first = n - 1 if first is None else first
        left = clock((now - began) / (n - first) * (max_iters - n))
        val = f"  val loss {record['val_loss']:.4f}" if "val_loss" in record else ""
        watched = (name for name in WATCHED if name in record)
        watched = "".join(f"  {name.replace('_', ' ')} {record[name]:.3f}" for name in watched)
        val += f" (floor {record['val_floor']:.4f})" if "val_floor" in record else ""
        loss = f"  loss {record['train_loss']:.4f}" * ("reward" not in record)  # RLHF's is near 0 always
        text = f"{n:{len(str(max_iters))}}/{max_iters}{loss}{watched}{val}"
        text += f"  {record['tokens_per_s']:,.0f} tokens/s  {left} left"
        if not renews:
            if val or n % every == 0:
                say(text)
        elif val or n == max_iters:
            renew(text, nl=True)
        elif now - shown > 0.1:
            shown, done = now, 20 * n // max_iters
            renew(text, before=f"[{'#' * done}{'-' * (20 - done)}] ")

    return report


def command(*words: str) -> str:
    """A command to type next: by the path it was called with, where the shell would not find it by name."""
    called = Path(sys.argv[0])
    unknown = called.name == "tinygpt" and not shutil.which("tinygpt")
    return shlex.join([str(called) if unknown else "tinygpt", *words])


def data_options(paths: Iterable[str]) -> list[str]:
    return [word for path in paths for word in ("--data", path)]


def shown_token(token: bytes) -> str:
    """A token as text, with parts of characters, and characters that cannot be printed, as bytes: <ea b0>."""
    text = token.decode("utf-8", "surrogateescape").replace(" ", "\u2423")
    texts = ["".join(run) if whole else "".join(run).encode("utf-8", "surrogateescape").hex(" ").join("<>")
             for whole, run in groupby(text, str.isprintable)]  # fmt: skip
    return "".join(texts)
