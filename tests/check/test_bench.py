"""The benchmark: its parts, and its picture. tests/shell/test_cli.py runs some jobs."""

import numpy as np
import pytest

from tinygpt.check import bench
from tinygpt.core import kernels
from tinygpt.errors import UserError

needs_c = pytest.mark.skipif("c" not in kernels.available(), reason="bench measures the C core")


@needs_c
def test_a_job_of_several_sizes_has_a_row_for_each(monkeypatch):
    """Guards: a size that is measured with the threads of another one."""
    calls = []

    def apart(variables, function, *args):
        calls.append((variables.get("TINYGPT_THREADS"), function, *args[:1]))
        return (1e9, 1e9) if function == "machine" else {"job": args[0]}

    monkeypatch.setattr(bench, "_apart", apart)
    jobs = [row["job"] for row in bench.run(["gemm", "scaling"], 8)]
    assert jobs[: len(bench.GEMM)] == [f"gemm/{shape}" for shape in bench.GEMM]
    sizes = [f"scaling/{axis}={n}" for axis, sizes in bench.SCALING.items() for n in sizes]
    assert sorted(jobs[len(bench.GEMM) :]) == sorted(f"{n}/{t}" for n in sizes for t in bench.THREADS)
    for threads, _, job in calls[1::2]:
        assert threads == (job.split("/")[2] if job.startswith("scaling") else None)


@needs_c
@pytest.mark.parametrize("job", ["gemm/768x128x512", "scaling/T=64/1"])
def test_a_part_of_a_job_runs(job):
    """Guards: a part that raises an exception after minutes of other parts."""
    row = bench._measure(job, "float32", 0.01, 1e12, 1e12)
    assert row["job"] == job and row["ms"] > 0 and row["gflops"] > 0 and row["gb_per_s"] is None


def test_the_operations_of_a_part():
    """Guards: a share of the peak that counts each multiply-add once, or another size."""
    step, steps, tokens, flops, read = bench._gemm("8x4x2", "float32")
    assert (steps, tokens, flops, read) == (1, None, 2 * 8 * 4 * 2, None) and callable(step)
    _, _, tokens, flops, _ = bench.ROWS["scaling/B=1/1"]("float32")
    assert tokens == bench.BASE["T"] and flops > 6 * 12 * 4 * bench.BASE["C"] ** 2 * tokens


def test_the_picture_of_scaling(tmp_path):
    """Guards: minutes of measurements without a picture at the end."""
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="--plot draws the rows of the job scaling"):
        bench.plotter(tmp_path / "a.png", ["peak"])
    with pytest.raises(UserError, match="a picture's name ends in .png, .svg or .pdf"):
        bench.plotter(tmp_path / "a.txt", ["scaling"])
    with pytest.raises(UserError, match="no such folder"):
        bench.plotter(tmp_path / "nowhere" / "a.png", ["scaling"])
    rows = [{"job": f"scaling/{axis}={n}/{t}", "share_of_peak": np.log(n) / 9}
            for axis, sizes in bench.SCALING.items() for t in bench.THREADS for n in sizes]  # fmt: skip
    bench.plotter(tmp_path / "a.svg", ["scaling"])([{"job": "peak", "share_of_peak": 1}, *rows])
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
