"""How the processes of `mpiexec -n 4 tinygpt ...` begin and end. Their work is in `core/parallel`.

An error of one process ends all processes. mpiexec prints one error and returns its exit status.

- MPI begins before the imports that can fail. So a process that fails can tell the others.
- Process 0 prints its error at once. The text of another process waits until all processes have answered
  whether they failed too. The lowest process that failed prints its text and ends all processes.
- A process without an error answers at its next exchange. A process that hangs, or computes for longer than
  GRACE seconds, does not answer.

With an error no process simply exits. Before MPI has begun, MPICH's mpiexec would not end the others. Later
it would kill them, and would return the status of the error or of the kill.

Imports no NumPy. Imports mpi4py only under mpiexec.
"""

import contextlib
import functools
import io
import os
import platform
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from .errors import UserError

LAUNCHERS = ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")  # MPICH's, Open MPI's
FAILURE = 1  # the tag of the messages of processes that end
STARTING = 300.0  # seconds in which all processes begin MPI
GRACE = 3.0  # seconds in which the other processes answer
PRINTING = 0.5  # seconds in which mpiexec prints a text; after the end it prints no more


class PeerError(SystemExit):
    """Another process failed. This process ends without a text."""


def launched() -> tuple[int, int]:
    """(number of this process, number of processes), as mpiexec says in the environment."""
    sizes = ((os.environ.get(rank), os.environ.get(size)) for size, rank in LAUNCHERS)
    return next(((int(rank), int(size)) for rank, size in sizes if rank and size), (0, 1))


def start():
    """The module mpi4py.MPI, or None without mpiexec. The first import begins MPI, in all processes together.

    Raises UserError without mpi4py, and where mpi4py uses another MPI than mpiexec.
    """
    size = launched()[1]
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails: {error}"
        raise UserError(f"mpi4py, which mpiexec needs, {reason}; pip install mpi4py mpich") from None
    if (other := MPI.COMM_WORLD.size) != size:
        raise UserError(f"mpiexec has {size} processes and mpi4py {other}: they are of different MPIs")
    return MPI


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Around `start`: ends all processes if MPI does not begin, because a process did not start, or hangs.

    A child process has the clock. A thread cannot have it, because MPI's start holds Python's lock.
    """
    rank, size = launched()
    if size == 1 or not hasattr(os, "fork"):
        yield
        return
    clock, end = os.pipe()
    parent = os.getpid()
    if not (child := os.fork()):
        try:
            os.close(end)  # the parent's copy closes at the latest when the parent ends
            # the waiting process with the lowest number is the first to end all
            if not select.select([clock], [], [], STARTING + rank)[0]:
                text = f"MPI has not begun for {STARTING:g} seconds: a process did not start, or hangs"
                print(f"tinygpt: {text}", file=sys.__stderr__, flush=True)
                _abort(2)
                if os.getppid() == parent:
                    os.kill(parent, signal.SIGKILL)
        except KeyboardInterrupt:  # the parent gets Ctrl-C too, and waits in MPI's start
            _abort(130)
        finally:
            os._exit(0)
    os.close(clock)
    try:
        yield
    finally:
        os.close(end)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(child, 0)


def together(program: Callable[[], None]) -> None:
    """Runs a program. Under mpiexec, an error of one process ends all processes."""
    rank, size = launched()
    if size == 1:
        return program()
    status, is_peer = 0, False
    if rank:
        sys.stdout, sys.stderr = None, io.StringIO()
    try:
        program()
    except SystemExit as error:
        status, is_peer = error.code, isinstance(error, PeerError)
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        _end_all(status, is_peer)
    sys.exit(status)


def _end_all(status: int, is_peer: bool) -> None:
    """Ends all processes after an error. Returns after MPI's end only: then process 0 has an error alone."""
    MPI, (rank, size), failed = sys.modules.get("mpi4py.MPI"), launched(), []
    if MPI and MPI.Is_finalized():
        return
    has_begun = MPI and MPI.COMM_WORLD.size == size
    if has_begun and (rank or is_peer):
        failed, _ = answers(not is_peer)
    is_first = not is_peer and min([rank, *failed]) == rank
    if not is_first:
        time.sleep(GRACE)  # another process ends this one
    elif rank and not has_begun:
        time.sleep(GRACE + 2 * PRINTING * rank)  # a process with a lower number may end this one
    if is_first and rank:
        text = sys.stderr.getvalue() or "interrupted\n"
        print(f"process {rank} on {platform.node()}: {text}", end="", file=sys.__stderr__, flush=True)
    _abort(status)
    if has_begun:
        MPI.COMM_WORLD.Abort(status)
    os._exit(status)  # Open MPI's mpiexec then ends the others


def _abort(status: int) -> None:
    """Ends all processes, if mpiexec is MPICH's: it understands the message also before MPI has begun."""
    time.sleep(PRINTING)
    if pipe := os.environ.get("PMI_FD"):
        with contextlib.suppress(OSError):  # mpiexec is gone
            os.write(int(pipe), f"cmd=abort exitcode={status}\n".encode())
        time.sleep(GRACE)


@functools.cache
def answers(has_failed: bool) -> tuple[list[int], list[int]]:
    """Tells all other processes that this one ends, and waits up to GRACE seconds for their answers.

    Returns the ranks of the processes that failed, and the ranks of those without an answer.
    """
    world = start().COMM_WORLD
    ranks = [rank for rank in range(world.size) if rank != world.rank]
    words = {rank: bytearray(1) for rank in ranks}
    for rank in ranks:
        world.Isend(bytes([has_failed]), rank, FAILURE)  # so few bytes leave at once
    waits = {rank: world.Irecv(words[rank], rank, FAILURE) for rank in ranks}
    end = time.monotonic() + GRACE
    while waits and time.monotonic() < end:
        waits = {rank: wait for rank, wait in waits.items() if not wait.Test()}
        time.sleep(0.01)
    return [rank for rank in ranks if words[rank][0]], list(waits)
