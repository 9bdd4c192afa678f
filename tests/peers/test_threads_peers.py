"""Two thread pools in one process: torch's and ours, either imported first, and after a fork.

Guards llm.c 74: two OpenMP runtimes in one process abort; and a forked child that waits for threads it lacks.
"""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch")

PROGRAM = """
    {imports}
    import os
    import numpy as np
    kernels.set_threads(2)
    torch.set_num_threads(2)
    a, b = np.random.default_rng(0).standard_normal((2, 300, 300))

    def both():
        expected = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
        assert np.abs(kernels.gemm(a, b) - expected).max() < 1e-10

    for _ in range(20):
        both()
    if not (child := os.fork()):
        for _ in range(20):
            assert np.abs(kernels.gemm(a, b) - a @ b).max() < 1e-10
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    both()
    print("done")
"""


@pytest.mark.parametrize(
    "imports",
    ["import torch; from tinygpt.core import kernels", "from tinygpt.core import kernels; import torch"],
)
def test_torch_in_the_same_process(imports):
    program = textwrap.dedent(PROGRAM.format(imports=imports))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "done", result.stderr
