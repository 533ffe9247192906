"""Arrays on several devices: a batch, a tall matrix by rows, right-hand sides by columns.

Devices are counted when JAX starts, so each test of several is a program of its own.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from marks import slow

from jlstsq import lstsq

START = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jlstsq import lstsq

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
rng = np.random.default_rng(0)
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.KIND,))

def close(result, expected):
    for x, y in zip(result, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-9, atol=1e-12)
"""


def run(kind, program):
    subprocess.run([sys.executable, "-c", START.replace("KIND", kind) + program], check=True, timeout=900)


EVERY = [False, *slow(True)]

EXPLICIT = """
x, none = "x", None
cases = [  # shapes of A and B, how they are sharded, and the solution
    ((40, 6), (40,), (x,), (x,), (none,)),
    ((40, 6), (40, 4), (x,), (none, x), (none, x)),
    ((6, 40), (6,), (none, x), (none,), (none,)),
    ((4, 9, 3), (4, 9, 2), (x,), (x,), (x, none, none)),
    ((4, 9, 3), (9, 2), (x,), (none,), (x, none, none)),
    ((9, 3), (4, 9, 2), (none,), (x,), (x, none, none)),
]
for shape_a, shape_b, spec_a, spec_b, spec in cases if every else cases[:1]:
    A, B = rng.standard_normal(shape_a), rng.standard_normal(shape_b)
    data = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*s))) for a, s in ((A, spec_a), (B, spec_b))]
    for driver in ("gels", "gelsd") if every else ("gelsd",):
        def value(A, B):
            return lstsq(A, B, driver=driver)

        def loss(A, B):
            result = value(A, B)
            return (result.solution**2).sum() + result.residuals.sum() + (result.singular_values**2).sum()

        result = value(*data)
        assert tuple(jax.typeof(result.solution).sharding.spec) == spec
        close(result, value(A, B))
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        sharded = gradient(*data)
        close(sharded, gradient(A, B))
        assert [jax.typeof(g) for g in sharded] == [jax.typeof(a) for a in data]
    if every:
        if len(shape_a) == len(shape_b) == 3:
            close(jax.vmap(value)(*data), jax.vmap(value)(A, B))
        more = dict(weights=np.full(shape_a[-2], 2.0), ridge=0.1, driver="gels")
        close(lstsq(*data, **more), lstsq(A, B, **more))
        # A batch that only the weights have.
        more["weights"] = rng.uniform(1, 2, (3, *[1] * (max(A.ndim, B.ndim) - 2), A.shape[-2]))
        close(lstsq(*data, **more), lstsq(A, B, **more))
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True], ids=["some", "every"])
def test_explicit_mesh(every):
    """The kind of axes that `jax.make_mesh` makes: results and gradients are sharded as the data is."""
    run("Explicit", f"every = {every}" + EXPLICIT)


ROWS = """
rows = NamedSharding(mesh, PartitionSpec("x"))
for p, driver in ((3, "gels"), (8, "gelsd"))[: 2 if every else 1]:
    A, b = rng.standard_normal((20000, p)), rng.standard_normal((20000, 5))
    data = jax.device_put((A, b), rows)
    gradient = jax.grad(lambda A, b: lstsq(A, b, driver=driver).solution.sum(), (0, 1))
    for fun in (lambda A, b: lstsq(A, b, driver=driver), gradient):
        compiled = jax.jit(fun).lower(*data).compile()
        out = compiled(*data)
        close(out, fun(A, b))
        # Only a branch that is not taken gathers A.
        entry = compiled.as_text().split("ENTRY ")[1]
        assert " all-reduce(" in entry
        assert " all-gather(" not in entry
    assert all(g.sharding.is_equivalent_to(rows, g.ndim) for g in out)
"""


@pytest.mark.cpu
@pytest.mark.parametrize("every", EVERY, ids=["some", "every"])
def test_rows_are_not_gathered(every):
    """A tall matrix sharded by rows: the sums over rows are reduced, its gradient stays where A is."""
    run("Auto", f"every = {every}" + ROWS)


SMALL = """
A, B = rng.standard_normal((200, 4, 2)), rng.standard_normal((200, 4, 1))
data = jax.device_put((A, B), NamedSharding(mesh, PartitionSpec("x")))
for driver in ("gels", "gelsy", "gelsd") if every else ("gels",):
    value = jax.jit(lambda A, B: lstsq(A, B, driver=driver)[:3])
    gradient = jax.jit(jax.grad(lambda A, B: (value(A, B)[0] ** 2).sum(), (0, 1)))
    for fun in (value, gradient) if every else (value,):
        close(fun(*data), fun(A, B))
"""


@pytest.mark.parametrize("every", EVERY, ids=["some", "every"])
def test_many_small_matrices(every):
    """What one device does in one kernel is divided among several."""
    run("Auto", f"every = {every}" + SMALL)


BATCH = """
for shape in ((4, 6, 3), (4, 40, 12)):
    A, B = rng.standard_normal(shape), rng.standard_normal(shape[:-1])
    A[1, :, 0] = A[1, :, 1]
    for driver in ("gels", "gelsy", "gelsd"):
        value = lambda A, B: lstsq(A, B, driver=driver)[:2]
        gradient = jax.grad(lambda A, B: (value(A, B)[0] ** 2).sum())
        for fun in (value, gradient):
            spec = PartitionSpec("x")
            sharded = jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=(spec, spec), out_specs=spec))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), sharded(A, B), fun(A, B))
        # One of the two replicated: its gradient is summed over the devices.
        gradient = jax.grad(lambda A, B: (value(A, B)[0] ** 2).sum(), (0, 1))
        specs = (spec, PartitionSpec())
        sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))
        pairs = zip(sharded(A, B[0]), gradient(A, B[0]), strict=True)
        # gels: NaN from the dependent element, in the sum of both
        assert all(np.allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True) for x, y in pairs)
"""


@pytest.mark.parametrize("driver", ["gelsy", *slow("gels", "gelsd")])
@pytest.mark.parametrize("shape", [(4, 6, 3), *slow((4, 40, 12))], ids=str)
def test_varying_types(shape, driver, x64):
    """The types of what varies over a mesh are right, traced without compiling: one device is enough."""
    mesh, spec = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec("x")
    A, B = np.ones(shape), np.ones(shape[:-1])

    def value(A, B):
        return lstsq(A, B, driver=driver)[:2]

    gradient = jax.grad(lambda A, B: (value(A, B)[0] ** 2).sum(), (0, 1))
    for fun in (value, gradient):
        sharded = jax.shard_map(fun, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        result = jax.eval_shape(sharded, A, B)
        assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, jax.eval_shape(fun, A, B))


@pytest.mark.slow
def test_shard_map():
    """A batch over two devices, with its checks of varying axes."""
    run("Auto", BATCH)
