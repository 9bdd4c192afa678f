"""Data parallelism: several processes, on one machine or many, train one model. `mpiexec -n 4 tinygpt ...`

Each process has all weights and computes the gradients of its share of an update's batches. Process r keeps
the two moments of slice r of the weights and no others (ZeRO, stage 1), and an update has four steps:

    every process    adds the gradients of its batches
    reduce           process r receives slice r of every process's sum, and adds these P slices
    step             process r updates slice r of the weights
    gather           every process receives all slices of the weights

The two exchanges move as many bytes as a ring all-reduce of the gradients. The weights have the same bytes
for any number of processes, because a sum depends on its order and here the order is fixed: a binary tree
over the numbers of the batches, ((0 + 1) + (2 + 3)) + ... A process whose batches are a power of two adds a
subtree of it. Where they are not, the bytes depend on the number of processes.

A process that waits for others naps, because these may need its processor. Once all have come, the exchange
itself polls without naps.

Not here: slices of weights or of gradients (ZeRO, stages 2 and 3), pipelines, an exchange while gradients are
still being computed. mpi4py is imported only where mpiexec started several processes.

Reference: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
sections 5.1 and 7.1.
"""

import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..errors import UserError
from . import kernels
from .ops import PARTS, Array

LAUNCHERS = ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")  # MPICH's, Open MPI's
PIECE = 1 << 22  # numbers that a process receives at a time: the memory of `reduce`
LINE = 4096  # bytes of a text that processes exchange, at most
AWAKE, NAP = 1.0, 5e-4  # seconds of an exchange without naps; the longest nap
GRACE = 1.0  # seconds after an error in which other processes may have one too
WORDS = 1  # the tag of last words


class HangError(UserError):
    """Other processes did not come in the time that is allowed."""


class Alone:
    """One process: nothing is exchanged."""

    rank, size = 0, 1

    def shares(self, count: int) -> int:
        """Of `count` batches, those of one process. Raises UserError where the processes differ in that."""
        if count % self.size:
            raise UserError(
                f"an update has {count} batches, which {self.size} processes cannot share alike: begin with "
                f"--gradient-accumulation-steps {-(-count // self.size) * self.size}, or another multiple of "
                f"{self.size}; a smaller --batch-size keeps the tokens of an update"
            )
        return count // self.size

    def share(self, batches: Sequence, rng: np.random.Generator, draws: int) -> Sequence:
        """This process's batches: those whose turn it is, one after the other.

        Every batch takes `draws` numbers of 64 bits from `rng`; those of the batches before are skipped.
        """
        count = self.shares(len(batches))
        rng.bit_generator.advance(self.rank * count * draws)
        return batches[self.rank * count : (self.rank + 1) * count]

    def meet(self) -> None:
        """Returns when all processes have called this."""

    def merged(self, array: Array) -> Array:
        """The arrays of all processes in one: each number is one process's, and the others have 0 there."""
        return array

    def reduce(self, flat: Array, bounds: Sequence[int], value: float) -> float:
        """Adds up the gradients `flat` of all processes, each in its own slice, between its two bounds. The
        rest of `flat` is no sum. Returns the sum of the values."""
        return value

    def gather(self, flat: Array, bounds: Sequence[int]) -> None:
        """Fills `flat` with the slices of all processes."""

    def lines(self, text: str) -> list[str]:
        """The texts of all processes, cut at LINE bytes."""
        return [text]

    def agree(self, *flags: object) -> list[bool]:
        """Which flags any process has."""
        return [bool(flag) for flag in flags]

    def leave(self) -> None:
        """The end of all exchanges. Process 0, which goes on, has all processors of its machine again."""

    def alike(self, facts: Mapping[str, str]) -> None:
        """Raises UserError, in all processes, where their facts differ: it names which, and who."""
        rows = [line.split("\t") for line in self.lines("\t".join([platform.node(), *facts.values()]))]
        host, *first = rows[0]
        for rank, (other, *values) in enumerate(rows):
            names = [name for name, a, b in zip(facts, first, values, strict=True) if a != b]
            if names:
                who = f"process {rank} on {other} and process 0 on {host}"
                raise UserError(f"{who} differ in: {', '.join(names)}")


ALONE = Alone()


class Processes(Alone):
    """The processes that mpiexec started, of which this is number `rank` of `size`."""

    def __init__(self, mpi, hang_timeout: float) -> None:
        """mpi: the module mpi4py.MPI. hang_timeout: seconds, see `HangError`."""
        self.mpi, self.comm, self.hang_timeout = mpi, mpi.COMM_WORLD, hang_timeout
        self.rank, self.size = self.comm.rank, self.comm.size
        self.others = [rank for rank in range(self.size) if rank != self.rank]

    def meet(self) -> None:
        self._wait([self.comm.Ibarrier()])

    def merged(self, array: Array) -> Array:
        total = np.empty_like(array)
        self._wait([self.comm.Iallreduce(array, total)])  # of which one summand is not 0: any order will do
        return total

    def reduce(self, flat: Array, bounds: Sequence[int], value: float) -> float:
        values = np.zeros(self.size)
        values[self.rank] = value
        values = self.merged(values)  # here all meet
        count = max(1, PIECE // self.size)
        parts = np.empty((self.size, count), flat.dtype)
        for i in range(0, max(np.diff(bounds)), count):
            pieces = [flat[begin + i : max(begin + i, min(begin + i + count, end))]
                      for begin, end in pairwise(bounds)]  # fmt: skip
            own = pieces[self.rank]
            received = [part[: own.size] for part in parts]
            requests = [self.comm.Irecv(received[rank], rank) for rank in self.others]
            requests += [self.comm.Isend(pieces[rank], rank) for rank in self.others]
            received[self.rank] = own
            self._wait(requests, AWAKE)
            own[:] = tree_sum(received)
        return float(tree_sum(values))

    def gather(self, flat: Array, bounds: Sequence[int]) -> None:
        self.meet()
        slices = [flat, np.diff(bounds), bounds[:-1], self.mpi.Datatype.fromcode(flat.dtype.char)]
        self._wait([self.comm.Iallgatherv(self.mpi.IN_PLACE, slices)], AWAKE)

    def lines(self, text: str) -> list[str]:
        rows = np.zeros((self.size, LINE), np.uint8)
        _write(rows[self.rank], text)
        return [_read(row) for row in self.merged(rows)]

    def agree(self, *flags: object) -> list[bool]:
        rows = np.zeros((self.size, len(flags)))
        rows[self.rank] = [bool(flag) for flag in flags]
        return self.merged(rows).any(0).tolist()

    def _wait(self, requests: list, awake: float = 0.0) -> None:
        """Until all are done. The longer it takes, the longer are the naps, after `awake` seconds."""
        began = time.monotonic()
        while not self.mpi.Request.Testall(requests):
            waited = time.monotonic() - began
            if waited > self.hang_timeout:
                raise HangError(f"no answer for {self.hang_timeout:g} seconds")
            time.sleep(min(max(0.0, waited - awake) / 10, NAP))

    def last_words(self, error: Exception, text: str) -> tuple[str, bool]:
        """What is to be said of an error in this process, "" if another one says it; and whether all
        processes end with one. If not, only `abort` ends the others."""
        own, texts = np.zeros(LINE, np.uint8), np.zeros((self.size, LINE), np.uint8)
        _write(own, text)
        sent = [self.comm.Isend(own, rank, WORDS) for rank in self.others]
        awaited = {rank: self.comm.Irecv(texts[rank], rank, WORDS) for rank in self.others}
        # who waits for the same process began to wait at another time
        end = time.monotonic() + GRACE + (self.hang_timeout / 10 if isinstance(error, HangError) else 0)
        while awaited and time.monotonic() < end:
            awaited = {rank: request for rank, request in awaited.items() if not request.Test()}
            time.sleep(0.01)
        if not awaited:
            self.mpi.Request.Waitall(sent)
        if any(rank < self.rank for rank in self.others if rank not in awaited):
            return "", not awaited
        if isinstance(error, HangError):
            text = f"no answer from process {', '.join(map(str, awaited))} for {self.hang_timeout:g} seconds"
        elif awaited and self.rank:
            text = f"process {self.rank} on {platform.node()}: {text}"
        return text, not awaited

    def abort(self) -> None:
        """Ends all processes."""
        self.comm.Abort(2)

    def leave(self) -> None:
        self.meet()
        self.mpi.Finalize()
        _set_threads(1)


def launched() -> tuple[int, int]:
    """(the number of this process, how many there are), as mpiexec says in the environment."""
    sizes = ((os.environ.get(rank), os.environ.get(size)) for size, rank in LAUNCHERS)
    return next(((int(rank), int(size)) for rank, size in sizes if rank and size), (0, 1))


def join(hang_timeout: float = 1800.0) -> Alone:
    """The processes that mpiexec started, or this one alone. The processors of a machine are divided among
    its processes, unless TINYGPT_THREADS says how many threads each has.

    Raises UserError without mpi4py, and where it belongs to another MPI than mpiexec.
    """
    rank, size = launched()
    if size == 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails: {error}"
        raise UserError(f"mpi4py, which mpiexec needs, {reason}; pip install mpi4py mpich") from None
    group = Processes(MPI, hang_timeout)
    if group.size != size:
        raise UserError(f"mpiexec has {size} processes and mpi4py {group.size}: they are of different MPIs")
    if kernels.lib and not os.environ.get("TINYGPT_THREADS"):
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        place = digest(repr((platform.node(), sorted(allowed))).encode())
        _set_threads(group.lines(place).count(place))
    return group


def _set_threads(processes: int) -> None:
    if kernels.lib and not os.environ.get("TINYGPT_THREADS"):
        kernels.set_threads(max(1, kernels.processors() // processes))


def slices(size: int, processes: int) -> list[int]:
    """The bounds of the slices of `size` numbers. No slice ends within a part of `ops.squares`."""
    length = -(-size // PARTS)
    return [min(size, length * (PARTS * rank // processes)) for rank in range(processes + 1)]


def half(count: int) -> int:
    """Where a binary tree over `count` numbers is cut: the largest power of two below."""
    return 1 << (count - 1).bit_length() - 1


def tree_sum(parts: Sequence):
    """Arrays or numbers, added in a binary tree: ((0 + 1) + (2 + 3)) + (4 + 5)."""
    if len(parts) == 1:
        return parts[0]
    cut = half(len(parts))
    return tree_sum(parts[:cut]) + tree_sum(parts[cut:])


def digest(data) -> str:
    """A short hash of bytes, for comparisons."""
    return hashlib.sha256(data).hexdigest()[:16]


def _write(row: Array, text: str) -> None:
    data = text.encode()[:LINE]
    row[: len(data)] = np.frombuffer(data, np.uint8)


def _read(row: Array) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")
