"""Both precisions: `x64` runs a test in float64, `precision` in each of the two.

What takes time is compiling. So programs are compiled without LLVM's expensive passes and as `light` says, in
a quarter of the time, save where that matters (the marker `optimised`). And `gelss`, on a CPU the program of
gelsd, is slow, and what takes long to compile in double precision too (the marker `single_first`).
"""

import gc

import jax
import light
import pytest

light.install()


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


@pytest.fixture(autouse=True)
def _compilation(request):
    light = request.node.get_closest_marker("optimised") is None
    if light != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", light)


def pytest_collection_modifyitems(items):
    elsewhere = jax.default_backend() != "cpu"
    for item in items:
        if elsewhere and item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="of programs compiled for the CPU"))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        double = item.get_closest_marker("single_first") and params.get("precision")
        if double or params.get("driver") == "gelss":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    # Traces are many small objects: to look for garbage among them all the time takes a tenth of the time.
    gc.disable()
    yield
    # Every compiled program holds memory maps, of which a process may have 65 530.
    jax.clear_caches()
    gc.enable()
    gc.collect()
