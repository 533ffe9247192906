"""vmap, jit, scan, checkpoint, export: the same results, and the same cost."""

import functools
import math
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from marks import slow, slow_cases

from jlstsq import factorize, lstsq

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
# Where the drivers run the same code, the default run takes one or two of them.
LONGEST = ("gelsy", *slow("gels", "gelsd", "gelss"))
SHARED = ("gels", "gelsy", *slow("gelsd", "gelss"))


def data(shape_a=(6, 4, 3), shape_b=(6, 4, 2), seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape_a), rng.standard_normal(shape_b)


@pytest.mark.parametrize("driver", LONGEST)
def test_vmap_is_the_batched_call(driver, x64):
    A, B = data()
    fun = functools.partial(lstsq, driver=driver)
    batched = fun(A, B)
    for x, y in zip(jax.vmap(fun)(A, B), batched, strict=True):
        if y.shape != (0,):
            np.testing.assert_allclose(x, y, atol=1e-12)
    nested = jax.vmap(jax.vmap(fun))(A.reshape(2, 3, 4, 3), B.reshape(2, 3, 4, 2)).solution
    np.testing.assert_allclose(nested.reshape(6, 3, 2), batched.solution, atol=1e-12)
    over_b = jax.vmap(lambda b: fun(A[0], b).solution, in_axes=-1, out_axes=-1)(B[0])
    np.testing.assert_allclose(over_b, batched.solution[0], atol=1e-12)
    over_a = jax.vmap(fun, in_axes=(0, None))(A, B[0]).solution
    np.testing.assert_allclose(over_a, fun(A, B[0]).solution, atol=1e-12)


@pytest.mark.parametrize("driver", ["gelsy", *slow("gelsd", "gelss")])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_vmap_keeps_the_branch(driver, gradient, x64):
    A, B = data()

    def solve(A, B):
        return lstsq(A, B, driver=driver).solution.sum()

    fun = jax.grad(solve) if gradient else solve
    text = jax.jit(jax.vmap(fun)).lower(A, B).compile().as_text()
    # gelsd's values have none: matrices this small are decided in lanes.
    assert " conditional(" in text or (driver in ("gelsd", "gelss") and not gradient)
    batched = (lambda A, B: jax.grad(lambda A: solve(A, B))(A)) if gradient else solve
    expected = jax.jit(batched).lower(A, B).compile().as_text()
    assert text.count(" conditional(") == expected.count(" conditional(")


@pytest.mark.parametrize("driver", LONGEST)
def test_right_hand_sides_share_a_factorisation(driver, x64):
    A, B = np.ones((50, 3)), np.ones((7, 50, 1))
    for fun in (
        lambda A, B: lstsq(A, B, driver=driver).solution,
        jax.vmap(lambda B: lstsq(A, B, driver=driver).solution),
    ):
        args = (A, B) if fun.__name__ == "<lambda>" and fun.__code__.co_argcount == 2 else (B,)
        text = jax.jit(fun).lower(*args).compile().as_text()
        lines = [x for x in text.splitlines() if "geqrf" in x and "custom-call" in x]
        assert lines
        assert not any("f64[7,50," in line for line in lines)


@pytest.mark.parametrize("driver", LONGEST)
def test_loops(driver, x64):
    A, B = data()
    fun = functools.partial(lstsq, driver=driver)
    expected = fun(A, B).solution
    np.testing.assert_allclose(jax.lax.map(lambda ab: fun(*ab).solution, (A, B)), expected, atol=1e-12)
    _, scanned = jax.lax.scan(lambda c, ab: (c, fun(*ab).solution), 0.0, (A, B))
    np.testing.assert_allclose(scanned, expected, atol=1e-12)
    loss = lambda A: fun(A, B).solution.sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(A), jax.grad(loss)(A), atol=1e-10)
    shapes = jax.eval_shape(fun, A, B)
    assert jax.tree.map(jnp.shape, fun(A, B)) == jax.tree.map(lambda s: s.shape, shapes)
    _, linear = jax.linearize(loss, A)
    np.testing.assert_allclose(linear(A), jax.jvp(loss, (A,), (A,))[1], atol=1e-10)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu", *slow("cpu")])
@pytest.mark.parametrize("driver", DRIVERS)
def test_lowering(driver, platform):
    """Export for every platform from this host, which also refuses unstable custom calls."""
    for shape in ((2, 6, 3), (2, 3, 6)):
        A, B = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (*shape[:-1], 2)))
        value = jax.jit(lambda A, B: lstsq(A, B, driver=driver))
        gradient = jax.jit(jax.grad(lambda A, B: lstsq(A, B, driver=driver).solution.sum(), argnums=(0, 1)))
        for fun in (value, gradient):
            assert jax.export.export(fun, platforms=[platform])(A, B).platforms == (platform,)


def single(shape, dtype):
    """Ill-conditioned float32 or complex64 data, the batch in front."""
    rng = np.random.default_rng(7)
    s = np.logspace(0, -3, shape[-1])
    A = np.stack([problems.with_spectrum(rng, *shape[1:], s, dtype) for _ in range(shape[0])]).astype(dtype)
    return A, problems.right_hand_side(rng, shape[0], shape[1], dtype).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    slow_cases(((3, 30, 10), np.complex64), ((2, 200, 70), np.float32)),
    ids=str,
)
def test_double_sums_under_vmap(shape, dtype):
    """Sums in float64 without the user's x64: derivatives of a vmap, and the vmap of derivatives."""
    A, B = single(shape, dtype)

    def loss(A, B):
        return (abs(lstsq(A, B[..., None], driver="gels").solution) ** 2).sum()

    inside = jax.vmap(jax.grad(loss))(A, B)
    outside = jax.grad(lambda A: jax.vmap(loss)(A, B).sum())(A)
    batched = jax.grad(loss)(A, B)
    scale = abs(batched).max()
    for gradient in (inside, outside):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, batched, atol=1e-4 * scale)
    with jax.enable_x64(True):
        exact = jax.grad(loss)(A.astype(np.result_type(dtype, float)), B.astype(np.result_type(dtype, float)))
    np.testing.assert_allclose(batched, exact, atol=1e-3 * np.asarray(abs(exact)).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 40, 10), np.complex64), ((4000, 80), np.float32)],
    ids=str,
)
def test_double_sums_trace_anywhere(shape, dtype):
    """Nothing of the float64 program is seen by JAX's rules, which would make it float32, or complain."""
    A, B = (jax.ShapeDtypeStruct((*shape[:-1], columns), dtype) for columns in (shape[-1], 1))

    def solve(A, B):
        return lstsq(A, B, driver="gels").solution

    def loss(A, B):
        return (abs(solve(A, B)) ** 2).sum()

    with jax.numpy_dtype_promotion("strict"):
        jax.make_jaxpr(jax.grad(loss))(A, B)
    more = (jax.ShapeDtypeStruct((2, *x.shape), dtype) for x in (A, B))
    jax.make_jaxpr(jax.vmap(jax.grad(loss)))(*more)
    a, b = (jnp.ones(x.shape, dtype) for x in (A, B))
    jax.make_jaxpr(jax.jacfwd(lambda x: abs(solve(a, x * b))))(jnp.ones((*A.shape[-2:-1], 1)))
    jax.make_jaxpr(jax.hessian(lambda x: loss(a, x * b)))(1.0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_neighbours_change_no_bit(driver, x64):
    A, B = data()
    clean = lstsq(A, B, driver=driver)
    for bad in (np.nan, np.inf):
        dirty_a, dirty_b = A.copy(), B.copy()
        dirty_a[1, 0, 0] = bad
        dirty_b[2, 0, 1] = bad
        result = lstsq(dirty_a, dirty_b, driver=driver)
        np.testing.assert_array_equal(result.solution[3:], clean.solution[3:])
        np.testing.assert_array_equal(result.solution[2, :, 0], clean.solution[2, :, 0])
        assert np.isnan(result.solution[1]).all()
        assert np.isnan(result.solution[2, :, 1]).all()
        assert np.isnan(result.residuals[1]).all()
        if driver != "gels":
            assert result.rank[1] == 0
        if driver in ("gelsd", "gelss"):
            assert np.isnan(result.singular_values[1]).all()
    deficient = A.copy()
    deficient[1] = np.outer(A[1, :, 0], A[1, 0])
    result = lstsq(deficient, B, driver=driver)
    np.testing.assert_array_equal(result.solution[2:], clean.solution[2:])


@pytest.mark.parametrize("driver", SHARED)
def test_extreme_scales(driver, precision):
    dtype = np.float64 if precision else np.float32
    info = np.finfo(dtype)
    rng = np.random.default_rng(7)
    A = problems.with_spectrum(rng, 6, 3, [1, 0.5, 0.2])
    B = rng.standard_normal((6, 2))
    expected = np.linalg.pinv(A) @ B
    # Entries stay normal numbers: subnormal ones count as zero.
    low, high = int(np.log2(info.tiny)) + 12, info.maxexp - 4
    for exponent_a, exponent_b in [(high, high), (low, low), (high, 0), (low, low + 20)]:
        big_a, big_b = np.ldexp(A, exponent_a).astype(dtype), np.ldexp(B, exponent_b).astype(dtype)
        x = np.asarray(lstsq(big_a, big_b, driver=driver).solution)
        assert np.isfinite(x).all()
        if exponent_b - exponent_a > low:
            scaled = np.ldexp(x.astype(np.float64), exponent_a - exponent_b)
            np.testing.assert_allclose(scaled, expected, rtol=1e3 * info.eps)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(22, 4), (9, 7)], ids=str)
def test_derivatives_through_vmap_of_one_argument(shape, x64):
    """Outputs that do not depend on what is batched: a rule's batch must be the value's."""
    rng = np.random.default_rng(4)
    A, B, cuts = rng.standard_normal(shape), rng.standard_normal((10, shape[0])), np.array([1e-3, 1e-2, 1e-9])

    def outputs(A, b, rcond):
        result = lstsq(A, b, rcond, driver="gelsd")
        return result.solution, result.residuals, result.singular_values

    def loss(A, b, rcond):
        return sum((x**3).sum() for x in outputs(A, b, rcond))

    @jax.jit
    def batched(A):
        by_b = jax.grad(lambda A: jax.vmap(lambda b: loss(A, b, 1e-2))(B).sum())(A)
        by_cut = jax.grad(lambda A: jax.vmap(lambda cut: loss(A, B[0], cut))(cuts).sum())(A)
        forward_b = jax.jvp(lambda A: jax.vmap(lambda b: outputs(A, b, 1e-2))(B), (A,), (A,))[1]
        forward_cut = jax.jvp(lambda A: jax.vmap(lambda cut: outputs(A, B[0], cut))(cuts), (A,), (A,))[1]
        return by_b, by_cut, forward_b, forward_cut

    @jax.jit
    def alone(A, b, cut):
        return jax.grad(loss)(A, b, cut), jax.jvp(lambda A: outputs(A, b, cut), (A,), (A,))[1]

    each_b = [alone(A, b, 1e-2) for b in B]
    each_cut = [alone(A, B[0], cut) for cut in cuts]
    gradients = [sum(gradient for gradient, _ in each) for each in (each_b, each_cut)]
    forwards = [jax.tree.map(lambda *x: np.stack(x), *(f for _, f in each)) for each in (each_b, each_cut)]
    for x, y in zip(jax.tree.leaves(batched(A)), jax.tree.leaves((*gradients, *forwards)), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("driver", LONGEST)
@pytest.mark.parametrize("shape", [(22, 4), *slow((80, 40))], ids=str)
def test_vmap_over_nothing(driver, shape):
    A, b = np.ones((0, *shape)), np.ones((0, shape[0]))
    assert jax.vmap(lambda A, b: lstsq(A, b, driver=driver))(A, b).solution.shape == (0, shape[1])
    gradient = jax.grad(lambda A: jax.vmap(lambda A, b: lstsq(A, b, driver=driver).solution)(A, b).sum())
    assert gradient(A).shape == A.shape


# Small matrices, the Gram matrix, a wide one, LU, a batch in lanes, blocks.
@pytest.mark.parametrize(
    "shape",
    [(5, 30), (120, 120), (40, 60, 20), *slow((9, 3), (60, 20), (4, 8, 3))],
    ids=str,
)
@pytest.mark.parametrize("driver", LONGEST)
def test_no_rank_is_promoted(shape, driver, x64):
    A, B = data(shape, (*shape[:-1], 2))

    def value(A, B):
        result = lstsq(A, B, driver=driver)
        return result.solution.sum() + result.residuals.sum() + (result.singular_values**2).sum()

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.value_and_grad(value, (0, 1)), A, B)
        jax.eval_shape(jax.vmap(value), A[None], B[None])
        if shape[-1] == 3:
            jax.eval_shape(jax.hessian(value), A, B)


@pytest.mark.single_first
@pytest.mark.parametrize("driver", LONGEST)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("batch", [(), *slow((2,))], ids=str)
def test_export_of_any_number_of_rows(driver, gradient, batch, precision):
    """A symbolic dimension, at the default rcond."""
    dtype = np.float64 if precision else np.float32

    def value(A, b):
        return lstsq(A, b, driver=driver).solution.sum()

    fun = jax.jit(jax.grad(value) if gradient else value)
    (m,) = jax.export.symbolic_shape("m", constraints=["m >= 6"])
    exported = jax.export.export(fun)(
        *(jax.ShapeDtypeStruct(s, dtype) for s in ((*batch, m, 5), (*batch, m)))
    )
    A, b = (a.astype(dtype) for a in data((*batch, 30, 5), (*batch, 30)))
    np.testing.assert_allclose(exported.call(A, b), fun(A, b), rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize(("shape", "dtype"), [
    ((5, 12), np.complex64),
    *slow_cases(
        ((12, 5), np.float64), ((120, 120), np.float32), ((400, 70), np.float32),
        ((300, 8, 3), np.float64), ((40, 32, 8), np.float64), ((2, 130, 100), np.float64),
    ),
])  # fmt: skip
def test_gelss_is_gelsd_on_a_cpu(shape, dtype):
    """The same programs, to the last letter: `conftest.py` leaves out gelss' other tests there."""
    A, B = (np.ones(s, dtype) for s in (shape, (*shape[:-1], 2)))
    weights = np.ones(shape[:-1], A.real.dtype)

    def programs(driver):
        def plain(A, B, weights):
            return lstsq(A, B, 0.1, driver=driver)

        def weighted(A, B, weights):
            factorization = factorize(A, driver=driver, weights=weights, ridge=weights[..., 0])
            return factorization.lstsq(B), factorization.covariance()

        for values in (plain, weighted):

            def loss(*args, values=values):
                results = jax.tree.leaves(values(*args))
                return sum((abs(x) ** 2).sum() for x in results if jnp.issubdtype(x.dtype, jnp.inexact))

            gradient = jax.grad(loss, (0, 1))
            yield values, (A, B, weights)
            yield gradient, (A, B, weights)
            if shape == (12, 5):
                yield (lambda *args, f=gradient: jax.jvp(f, args, args)), (A, B, weights)
                yield jax.vmap(gradient), tuple(a[None] for a in (A, B, weights))

    with jax.enable_x64(dtype == np.float64):
        for one, other in zip(programs("gelsd"), programs("gelss"), strict=True):
            texts = [jax.jit(fun).lower(*args).as_text() for fun, args in (one, other)]
            assert texts[0] == texts[1]
            assert len(texts[0]) > 1000


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("driver", "gradient"),
    [
        pytest.param(
            driver, gradient, marks=() if (driver, gradient) == ("gelsy", True) else pytest.mark.slow
        )
        for driver in DRIVERS
        for gradient in (False, True)
    ],
)
def test_no_library_call_is_split_among_threads(driver, gradient):
    """Two batched LAPACK calls at once wait for each other for ever on two cores (jaxlib 0.10, 0.11)."""
    A, B = (jax.ShapeDtypeStruct((3000, 12, columns), np.float32) for columns in (10, 1))

    def fun(A, B):
        result = lstsq(A, B, driver=driver)
        return sum(x.sum() for x in result if x.dtype == A.dtype)

    text = jax.jit(jax.grad(fun) if gradient else fun).lower(A, B).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="lapack_' in line]
    assert calls
    # jaxlib's own count of operations per matrix, which decides
    count = {"geqrf": 2, "orgqr": 4, "trsm": 1, "potrf": 0.34, "gesdd": 10, "syevd": 10}
    for line in calls:
        name = re.search(r'"lapack_s(\w+)_ffi"', line)
        first = re.search(r"\w+\[([\d,]+)\]", line)
        assert name
        assert first
        *batch, rows, columns = map(int, first[1].split(","))
        if math.prod(batch) > 1:
            assert count[name[1]] * math.prod(batch) * rows * columns * min(rows, columns) < 200_000
