"""What several test files use."""

import numpy as np
import pytest

from tinygpt import kernels


@pytest.fixture(params=kernels.available())
def ops(request):
    """The operations, in each backend that works here."""
    return kernels.backend(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
