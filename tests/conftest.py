"""Both precisions: `x64` runs a test in float64, `precision` in each of the two."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 for the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def precision(request):
    """Run the test without and with 64-bit types."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    # Every compiled program holds memory maps, of which a process may have 65 530.
    yield
    jax.clear_caches()
