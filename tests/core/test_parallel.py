"""Data parallelism without processes: the order of sums, the slices, the random numbers. The processes are in
`tests/shell/test_mpiexec.py`."""

import subprocess
import sys

import numpy as np
import pytest

from tinygpt import launch
from tinygpt.core import parallel, train
from tinygpt.core.config import GPTConfig
from tinygpt.core.optim import AdamW
from tinygpt.errors import UserError
from tinygpt.stages import variants
from tinygpt.stages.adapter import AdapterConfig
from tinygpt.stages.variants import build

CONFIG = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16)


class Share(parallel.Group):
    """One of several processes, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_a_tree_has_the_order_that_the_page_says():
    """Guards: another order, in which blocks of a power of two are no subtrees."""
    sums = {n: parallel.tree_sum([Term(str(k)) for k in range(n)]).text for n in (1, 2, 3, 4, 6, 7)}
    assert sums == {
        1: "0", 2: "(0+1)", 3: "((0+1)+2)", 4: "((0+1)+(2+3))", 6: "(((0+1)+(2+3))+(4+5))",
        7: "(((0+1)+(2+3))+((4+5)+6))",
    }  # fmt: skip


def test_several_processes_train_all_weights():
    """Guards: slices of some gradients, taken as slices of all weights."""
    with pytest.raises(UserError, match="names must be None"):
        AdamW(build(CONFIG), ["wte.weight"], group=Share(0, 2))


class Term:
    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: "Term") -> "Term":
        return Term(f"({self.text}+{other.text})")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8, 24])
def test_processes_add_subtrees(rng, count):
    """Guards: weights that depend on the number of processes where each has 1, 2, 4, ... batches."""
    numbers = list(rng.standard_normal(count).astype(np.float32))
    whole = parallel.tree_sum(numbers)
    flat = np.zeros(1, np.float32)

    def compute(number):
        flat[0] = number
        return float(number)

    for size in (n for n in range(1, count + 1) if count % n == 0):
        each = count // size
        if each & (each - 1) == 0:
            parts = []
            for rank in range(size):
                share = Share(rank, size).share(numbers, np.random.default_rng(0), 0)
                train.accumulate(flat, compute, share)
                parts.append(flat[0].copy())
            assert parallel.tree_sum(parts) == whole
    train.accumulate(flat, compute, numbers)
    assert flat[0] == whole


def test_three_batches_are_added_one_after_the_other(rng):
    """Guards: runs of older versions that go on with other bytes: up to three batches nothing has changed."""
    a, b, c = rng.standard_normal((3, 1000)).astype(np.float32)
    assert (parallel.tree_sum([a, b, c]) == (a + b) + c).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 30_592, 1_000_003])
@pytest.mark.parametrize("processes", [1, 2, 3, 7, 8, 300])
def test_slices_cover_all_and_end_between_parts(size, processes):
    """Guards: weights of two processes or of none, a norm that depends on the number of processes."""
    bounds = parallel.slices(size, processes)
    assert bounds[0] == 0 and bounds[-1] == size and sorted(bounds) == bounds and len(bounds) == processes + 1
    length = -(-size // parallel.PARTS)
    assert all(bound % length == 0 or bound == size for bound in bounds)


ADAPTERS = {
    "none": None, "lora": AdapterConfig("lora", rank=2, alpha=3.0, dropout=0.2, full=True),
    "some": AdapterConfig("lora", rank=2, dropout=0.2, targets=("c_attn", "h.0.mlp.c_proj")),
    "ptuning": AdapterConfig("ptuning", num_virtual_tokens=2, hidden=5),
    "prefix": AdapterConfig("prefix", num_virtual_tokens=2),
}  # fmt: skip


def model(adapter=None, **changes):
    config = GPTConfig(**(vars(CONFIG) | changes))
    base = build(config, np.random.default_rng(0))
    return variants.create(base, adapter, np.random.default_rng(1)) if adapter else base


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"dropout": 0.1, "post_norm": True}], ids=str)
def test_a_model_says_how_many_numbers_it_draws(adapter, changes):
    """Guards: dropout of a batch that depends on which process computes it."""
    if adapter == "prefix" and changes.get("post_norm"):
        pytest.skip("no such model")
    one, ids = model(ADAPTERS[adapter], **changes), np.zeros((2, 5), np.int32)
    used, skipped = np.random.default_rng(3), np.random.default_rng(3)
    for generator in (used, skipped):
        generator.integers(10, size=3)  # leaves half of 64 bits over
    one.forward(ids, rng=used)
    Share(1, 2).share([0, 0], skipped, one.draws)
    assert used.integers(2**63) == skipped.integers(2**63)


@pytest.mark.parametrize("adapter", [None, ADAPTERS["lora"]], ids=["all", "lora"])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_slices_of_an_update_are_the_update(ops, rng, adapter, processes):
    """Guards: decay of vectors, moments or clipping of a slice that are not those of the whole."""
    whole = AdamW(model(adapter))
    slices = [AdamW(model(adapter), group=Share(rank, processes)) for rank in range(processes)]
    for part in (whole, *slices):
        part.model.ops = ops
    for _ in range(3):
        gradients = rng.standard_normal(whole.flat.size).astype(np.float32)
        for part in (whole, *slices):
            part.flat[:] = gradients
        total = sum(squares_of(slices))
        for part in slices:
            part.group.combine = lambda array, total=total: total
        norm = whole.step(1e-2)
        assert norm > 1  # it is clipped
        for part in slices:
            assert part.step(1e-2) == norm
            for name in ("m", "v"):
                assert (getattr(part, name) == getattr(whole, name)[part.slice]).all()
            assert (part.trained.flat[part.slice] == whole.trained.flat[part.slice]).all()
            part.trained.flat[:] = whole.trained.flat


def squares_of(slices: list[AdamW]) -> list[np.ndarray]:
    """What each process gives to the others for the norm."""
    parts = []
    for part in slices:
        part.group.combine = lambda array: parts.append(array) or array
        part._squares()
    return parts


def test_batches_that_cannot_be_shared():
    """Guards: a batch that nobody computes."""
    assert Share(0, 3).share_size(6) == 2
    with pytest.raises(UserError, match="accumulation-steps 9, or another multiple of 3"):
        Share(0, 3).share_size(8)


def test_one_process_imports_no_mpi():
    """Guards: mpi4py as a condition for those who do not use it."""
    program = "import sys, tinygpt.shell.training; print('mpi4py' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_what_differs_is_named(monkeypatch):
    """Guards: processes that train on other data, or with other rounding."""
    group = Share(0, 2)
    group.texts = lambda text: [text, "far\tsame\tother"]
    with pytest.raises(UserError, match="process 1 on far and process 0 on .* differ in: data$"):
        group.check_alike({"version": "same", "data": "mine"})
    group.texts = lambda text: [text, text]
    group.check_alike({"version": "same", "data": "mine"})


def test_a_launcher_says_who_one_is(monkeypatch):
    for name in (name for pair in launch.LAUNCHERS for name in pair):
        monkeypatch.delenv(name, raising=False)
    assert launch.launched() == (0, 1) and parallel.join() is parallel.ALONE
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert launch.launched() == (3, 4)
