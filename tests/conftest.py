"""What several test files use."""

import os

import numpy as np
import pytest

from tinygpt import kernels

if "c" not in kernels.available():  # or each command would say so, where tests expect one line
    os.environ.setdefault("TINYGPT_BACKEND", "numpy")


@pytest.fixture(params=kernels.available())
def ops(request):
    """The operations, in each backend that works here."""
    return kernels.backend(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
