"""Both precisions: `x64` runs a test in float64, `precision` in each of the two.

What takes time is compiling. So programs are compiled without LLVM's expensive passes and as `light` says, in
a quarter of the time, save where that matters (the marker `optimised`). What takes long to compile is slow in
double precision (the marker `single_first`). And `gelss` is on a CPU the program of gelsd, to the last letter
(`tests/test_transformations.py::test_gelss_is_gelsd_on_a_cpu`): only the contract table has it there.
"""

import gc

import jax
import light
import pytest
from halves import pytest_configure, pytest_runtestloop  # noqa: F401

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


def pytest_collection_modifyitems(config, items):
    on_cpu = jax.default_backend() == "cpu"
    same = []
    for item in items:
        if not on_cpu and item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="of programs compiled for the CPU"))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        double = item.get_closest_marker("single_first") and params.get("precision")
        gelss = params.get("driver") == "gelss"
        if double or gelss:
            item.add_marker(pytest.mark.slow)
        if on_cpu and gelss and item.path.stem != "test_contract":
            same.append(item)
    config.hook.pytest_deselected(items=same)
    items[:] = [item for item in items if item not in same]


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    # Traces are many small objects: to look for garbage among them all the time takes a tenth of the time.
    gc.disable()
    yield
    # Every compiled program holds memory maps, of which a process may have 65 530.
    jax.clear_caches()
    gc.enable()
    gc.collect()
