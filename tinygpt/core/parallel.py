"""Data parallelism: several processes, on one or many machines, train one model. `mpiexec -n 4 tinygpt ...`

Each process has all weights, and computes the gradients of its share of an update's batches. Process r keeps
the two moments of slice r of the weights only (ZeRO, stage 1). An update has four steps:

    every process    adds up the gradients of its batches
    reduce           process r receives slice r of the gradients of every process, and adds these up
    step             process r updates slice r of the weights
    gather           every process receives all slices of the weights

Reduce and gather together move as many bytes as a ring all-reduce of the gradients.

The weights have the same bytes for any number of processes. A sum of floats depends on its order, and the
order is fixed here: a binary tree over the numbers of the batches, ((0 + 1) + (2 + 3)) + ... A process with
1, 2, 4, ... batches adds up a subtree. With another number of batches the bytes depend on the number of
processes.

A process that waits for the others sleeps between its polls: the others may need its processor. An exchange
begins when all processes have arrived, and polls without sleep.

`launch` begins and ends the processes. Only processes that mpiexec started import mpi4py.

Not here: slices of weights or of gradients (ZeRO, stages 2 and 3), pipelines, an exchange that overlaps the
backward.

Reference: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
sections 5.1 and 7.1.
"""

import hashlib
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from .. import launch
from ..errors import UserError
from . import kernels
from .ops import Array

PARTS = 256  # parts of the gradients, each with one sum of squares; a slice begins and ends between two parts
PIECE = 1 << 22  # numbers that a process receives at a time: the memory of `reduce`
LINE = 4096  # bytes: the longest text that processes exchange
AWAKE, NAP = 1.0, 5e-4  # seconds: of polls without sleep in an exchange; of the longest sleep between polls
PATIENCE = 0.5  # seconds from another process's failure to the end of this process


class Group:
    """The processes that train one model; this is number `rank` of `size`. Group itself is one process."""

    rank, size = 0, 1

    def share_size(self, count: int) -> int:
        """How many of `count` batches each process computes. Raises UserError if the shares are not equal."""
        if count % self.size:
            raise UserError(
                f"an update has {count} batches, which {self.size} processes cannot share equally: begin "
                f"with --gradient-accumulation-steps {-(-count // self.size) * self.size}, or another "
                f"multiple of {self.size}; a smaller --batch-size keeps the tokens of an update"
            )
        return count // self.size

    def share(self, batches: Sequence, rng: np.random.Generator, draws: int) -> Sequence:
        """The batches of this process: one unbroken part of `batches`.

        Each batch takes `draws` numbers of 64 bits from `rng`. `share` moves rng past the numbers of the
        batches before this part.
        """
        count = self.share_size(len(batches))
        rng.bit_generator.advance(self.rank * count * draws)
        return batches[self.rank * count : (self.rank + 1) * count]

    def meet(self) -> None:
        """Returns when every process has called `meet`."""

    def combine(self, array: Array) -> Array:
        """The sum of the arrays of all processes. Of each number all summands but one must be 0."""
        return array

    def reduce(self, flat: Array, bounds: Sequence[int], value: float) -> float:
        """Adds up the gradients `flat` of all processes: process r gets the sum from bounds[r] to
        bounds[r + 1]. The rest of `flat` stays as it is. Returns the sum of the values of all processes."""
        return value

    def gather(self, flat: Array, bounds: Sequence[int]) -> None:
        """Fills `flat` with the slices of all processes; that of process r begins at bounds[r]."""

    def leave(self) -> None:
        """The end of all exchanges. Process 0 continues, with all processors of its machine."""

    def stack(self, row: Array) -> Array:
        """The rows of all processes in the order of their ranks: (...) -> (size, ...)."""
        rows = np.zeros((self.size, *row.shape), row.dtype)
        rows[self.rank] = row
        return self.combine(rows)

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, each cut to LINE bytes."""
        row = np.frombuffer(text.encode()[:LINE].ljust(LINE, b"\0"), np.uint8)
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in self.stack(row)]

    def agree(self, *flags: object) -> list[bool]:
        """For each flag, whether it is true in any process."""
        return self.stack(np.array([*map(bool, flags)], float)).any(0).tolist()

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Raises UserError, in all processes, if a process has other facts (name -> value) than process 0."""
        rows = [text.split("\t") for text in self.texts("\t".join([platform.node(), *facts.values()]))]
        host, *first = rows[0]
        for rank, (other, *values) in enumerate(rows):
            if names := [name for name, a, b in zip(facts, first, values, strict=True) if a != b]:
                both = f"process {rank} on {other} and process 0 on {host}"
                raise UserError(f"{both} differ in: {', '.join(names)}")


ALONE = Group()


class MPIGroup(Group):
    """The processes that mpiexec started."""

    def __init__(self, mpi, hang_timeout: float) -> None:
        """mpi: the module mpi4py.MPI. hang_timeout: the longest wait in seconds."""
        self.mpi, self.comm, self.hang_timeout = mpi, mpi.COMM_WORLD, hang_timeout
        self.rank, self.size = self.comm.rank, self.comm.size
        self.others = [rank for rank in range(self.size) if rank != self.rank]

    def meet(self) -> None:
        self._wait([self.comm.Ibarrier()])

    def combine(self, array: Array) -> Array:
        total = np.empty_like(array)
        self._wait([self.comm.Iallreduce(array, total)])  # in any order: x + 0 is x
        return total

    def reduce(self, flat: Array, bounds: Sequence[int], value: float) -> float:
        values = self.stack(np.array(value, float))  # all processes have arrived
        count = max(1, PIECE // self.size)
        buffers = np.empty((self.size, count), flat.dtype)
        parts = [flat[begin:end] for begin, end in pairwise(bounds)]
        for i in range(0, max(map(len, parts)), count):
            pieces = [part[i : i + count] for part in parts]
            piece = pieces[self.rank]
            summands = [buffer[: piece.size] for buffer in buffers]
            requests = [self.comm.Irecv(summands[rank], rank, 0) for rank in self.others]  # no other tag
            requests += [self.comm.Isend(pieces[rank], rank) for rank in self.others]
            summands[self.rank] = piece
            self._wait(requests, AWAKE)
            piece[:] = tree_sum(summands)
        return float(tree_sum(values))

    def gather(self, flat: Array, bounds: Sequence[int]) -> None:
        self.meet()
        slices = [flat, np.diff(bounds), bounds[:-1], self.mpi.Datatype.fromcode(flat.dtype.char)]
        self._wait([self.comm.Iallgatherv(self.mpi.IN_PLACE, slices)], AWAKE)

    def leave(self) -> None:
        self.meet()
        self.mpi.Finalize()
        _divide_processors(1)

    def _wait(self, requests: list, awake: float = 0.0) -> None:
        """Returns when all requests are done. After `awake` seconds it sleeps between two polls, longer and
        longer, up to NAP seconds.

        Raises UserError after hang_timeout seconds. Raises PeerError PATIENCE seconds after another process
        failed: an exchange that began before the failure can still be completed.
        """
        begin, failure = time.monotonic(), math.inf
        while not self.mpi.Request.Testall(requests):
            now = time.monotonic()
            if self.comm.Iprobe(tag=launch.FAILURE):
                failure = min(failure, now)
                if now - failure > PATIENCE:
                    raise launch.PeerError(2)
            if now - begin > self.hang_timeout:
                silent = ", ".join(map(str, launch.answers(True)[1]))
                text = f"no answer from process {silent} for" if silent else "an exchange took more than"
                raise UserError(f"{text} {self.hang_timeout:g} seconds (--hang-timeout)")
            time.sleep(min(max(0.0, now - begin - awake) / 10, NAP))


def join(hang_timeout: float = 1800.0) -> Group:
    """The group of the processes that mpiexec started. Without mpiexec, or with one process: ALONE.

    Processes on one machine share the processors: each has processors / processes threads, at least 1. If
    TINYGPT_THREADS is set, each process has this number of threads. Raises UserError as `launch.start` does.
    """
    if (mpi := launch.start()) is None:
        return ALONE
    group = MPIGroup(mpi, hang_timeout)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    place = digest(repr((platform.node(), sorted(allowed))).encode())
    _divide_processors(group.texts(place).count(place))  # an exchange: all processes come here
    return group


def _divide_processors(processes: int) -> None:
    if kernels.lib and not os.environ.get("TINYGPT_THREADS"):
        kernels.set_threads(max(1, kernels.processors() // processes))


def slices(size: int, processes: int) -> list[int]:
    """The bounds of the slices of `size` numbers, `processes` + 1 of them. They lie between the PARTS."""
    length = -(-size // PARTS)
    return [min(size, length * (PARTS * rank // processes)) for rank in range(processes + 1)]


def left_size(count: int) -> int:
    """How many of `count` summands are in the left branch of a tree: the largest power of two < count."""
    return 1 << (count - 1).bit_length() - 1


def tree_sum(parts: Sequence):
    """The sum of arrays or numbers in the order of a binary tree: ((0 + 1) + (2 + 3)) + (4 + 5)."""
    if len(parts) == 1:
        return parts[0]
    cut = left_size(len(parts))
    return tree_sum(parts[:cut]) + tree_sum(parts[cut:])


def digest(data) -> str:
    """A short hash of bytes, to compare them between processes."""
    return hashlib.sha256(data).hexdigest()[:16]
