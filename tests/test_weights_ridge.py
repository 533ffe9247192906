"""Weights and ridge: against the filtered SVD, 50 digits, and finite differences, also at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from marks import slow, slow_cases

from jlstsq import factorize, lstsq

DRIVERS = ("gels", "gelsy", "gelsd")
SHAPES = {"tall": (5, 3), "square": (3, 3), "wide": (3, 5)}
# Compiling is what a case costs: by default each driver and each shape once, in CI all of them.
_SLOW = ("gelsy", (3, 5)), ("gelsd", (5, 3))
TALL_WIDE = pytest.mark.parametrize(
    ("driver", "shape"), [("gelsy", (5, 3)), ("gelsd", (3, 5)), *slow_cases(*_SLOW)], ids=str
)
# And where that is much to compile, one.
WIDE = pytest.mark.parametrize(
    ("driver", "shape"), [("gelsd", (3, 5)), *slow_cases(("gelsy", (5, 3)), *_SLOW)], ids=str
)


def filtered(A, B, weights, ridge, rcond):
    """The definition: singular values of W^(1/2) A above the cut, each with s / (s^2 + ridge)."""
    root = np.sqrt(weights)[..., None]
    u, s, vh = np.linalg.svd(root * A, full_matrices=False)
    kept = s > rcond * s[..., :1]
    factor = np.where(kept, s / np.where(kept, s**2 + ridge, 1), 0)[..., None]
    x = vh.conj().swapaxes(-1, -2) @ (factor * (u.conj().swapaxes(-1, -2) @ (root * B)))
    return x, (weights[..., None] * abs(A @ x - B) ** 2).sum(-2), kept.sum(-1), s


@pytest.mark.parametrize("dtype", [*slow(np.float32), np.complex128])
@pytest.mark.parametrize(
    ("driver", "shape"),
    [
        ("gels", "square"),
        ("gelsy", "tall"),
        ("gelsd", "wide"),
        *slow_cases(("gels", "tall"), ("gels", "wide"), ("gelsy", "square")),
        *slow_cases(("gelsy", "wide"), ("gelsd", "tall"), ("gelsd", "square")),
    ],
)
def test_value(driver, shape, dtype):
    """A full and a deficient problem in one batch (gels: a full one)."""
    shape = SHAPES[shape]
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    spectra = [[1, 0.7, 0.4]] if driver == "gels" else [[1, 0.7, 0.4], [1, 0.6, 0]]
    with jax.enable_x64(dtype == np.complex128):
        A = np.stack([problems.with_spectrum(rng, *shape, s, dtype) for s in spectra]).astype(dtype)
        B = problems.right_hand_side(rng, shape[0], 2, dtype).astype(dtype)
        weights, ridge = rng.uniform(0.5, 2, shape[0]), 0.3
        result = lstsq(A, B, 1e-5, driver=driver, weights=weights, ridge=ridge)
        x, rho, rank, values = filtered(A.astype(np.complex128), B, weights, ridge, 1e-5)
        np.testing.assert_allclose(result.solution, x, atol=100 * eps)
        assert result.solution.dtype == dtype
        if shape[0] > shape[1]:
            np.testing.assert_allclose(result.residuals, rho, atol=200 * eps)
        if driver != "gels":
            np.testing.assert_array_equal(result.rank, rank)
        if driver == "gelsd":
            np.testing.assert_allclose(result.singular_values, values, atol=20 * eps)


@pytest.mark.parametrize("driver", ["gelsy", *slow("gelsd")])
def test_batches(driver, x64):
    """Weights bring a batch of their own; ridge and rcond go by the broadcast one."""
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((2, 1, 6, 3)), rng.standard_normal((2, 4, 6, 2))
    weights, ridge = rng.uniform(0.5, 2, (4, 6)), rng.uniform(0, 1, (2, 4))
    result = lstsq(A, B, 1e-9, driver=driver, weights=weights, ridge=ridge)
    x, rho, rank, _ = filtered(A, B, np.broadcast_to(weights, (2, 4, 6)), ridge[..., None], 1e-9)
    np.testing.assert_allclose(result.solution, x, atol=1e-12)
    np.testing.assert_allclose(result.residuals, rho, atol=1e-12)
    np.testing.assert_array_equal(result.rank, rank)
    vmapped = jax.vmap(
        jax.vmap(lambda a, b, w, r: lstsq(a, b, 1e-9, driver=driver, weights=w, ridge=r), (None, 0, 0, 0))
    )(A[:, 0], B, np.broadcast_to(weights, (2, 4, 6)), ridge)
    np.testing.assert_allclose(vmapped.solution, x, atol=1e-12)
    # the vector rule sees the broadcast batch: one right-hand side for each of eight problems
    vector = lstsq(A, B[..., 0], driver=driver, weights=weights, ridge=0.1)
    assert vector.solution.shape == (2, 4, 3)
    assert vector.residuals.shape == (2, 4, 1)


def test_ridge_is_the_filter(x64):
    """Ridge from 0 to 1e6 and condition numbers to 1e12, to 100 eps cond([A; sqrt(ridge) I])."""
    rng = np.random.default_rng(2)
    ridges = np.array([0, 1e-20, 1e-10, 1e-4, 1.0, 1e3, 1e6])
    path = jax.jit(
        lambda A, B: jax.vmap(lambda r: lstsq(A, B, 1e-15, driver="gelsd", ridge=r).solution)(ridges)
    )
    for kappa in (1e1, 1e4, 1e8, 1e12):
        U, V = problems.orthonormal(rng, 12, 5, float), problems.orthonormal(rng, 5, 5, float)
        s = np.logspace(0, -np.log10(kappa), 5)
        A, B = (U * s) @ V.T, rng.standard_normal((12, 2))
        u, s, vh = np.linalg.svd(A, full_matrices=False)
        for x, ridge in zip(path(A, B), ridges, strict=True):
            expected = vh.T @ ((s / (s**2 + ridge))[:, None] * (u.T @ B))
            smallest = np.hypot(s[-1], np.sqrt(ridge))
            condition = np.hypot(s[0], np.sqrt(ridge)) / smallest
            # Wedin: kappa |x| and kappa^2 / |A| |r|
            scale = np.abs(expected).max() + condition * np.abs(B).max() / np.hypot(s[0], np.sqrt(ridge))
            tolerance = 100 * np.finfo(float).eps * condition * scale
            np.testing.assert_allclose(x, expected, atol=tolerance, rtol=0)


def exact(A, b, weights):
    """The weighted solution in 50 digits (rational arithmetic: no digit is lost at all)."""
    from fractions import Fraction

    a, n = [[Fraction(float(v)) for v in row] for row in A], A.shape[1]
    w, f = [Fraction(float(v)) for v in weights], [Fraction(float(v)) for v in b]
    rows = [
        [sum(w[k] * a[k][i] * a[k][j] for k in range(len(a))) for j in range(n)]
        + [sum(w[k] * a[k][i] * f[k] for k in range(len(a)))]
        for i in range(n)
    ]
    for i in range(n):  # Gauss and Jordan; the matrix is positive definite
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for j in range(n):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return np.array([float(row[n]) for row in rows])


@pytest.mark.parametrize("driver", ["gelsd", *slow("gels", "gelsy")])
def test_rows_of_very_different_weight(driver, x64):
    rng = np.random.default_rng(3)
    solve = jax.jit(lambda A, b, w: lstsq(A, b, 0, driver=driver, weights=w).solution)
    for _ in range(4):
        A, b = rng.standard_normal((12, 5)), rng.standard_normal(12)
        few = np.arange(12) % 4 == 1
        heavy, light = np.where(few, 1e12, 1.0), np.where(few, 1e-12, 1.0)
        spread = 10.0 ** rng.uniform(-6, 6, 12)
        size = np.where(few, 1e12, 1.0)
        for a, f, w in [
            (A, b, heavy),
            (A, b, light),
            (A, b, spread),
            (A * size[:, None], b * size, np.ones(12)),
        ]:
            expected = exact(a, f, w)
            np.testing.assert_allclose(solve(a, f, w), expected, atol=1e-12 * np.abs(expected).max(), rtol=0)


@WIDE
def test_rows_of_weight_zero_change_nothing(driver, shape, x64):
    rng = np.random.default_rng(4)
    A, B = rng.standard_normal(shape), rng.standard_normal((shape[0], 2))
    weights = rng.uniform(0.5, 2, shape[0])
    weights[1] = 0
    A[1] *= 1e100
    rest = weights > 0
    for ridge in (None, 0.2):
        with_row = factorize(A, 1e-9, driver=driver, weights=weights, ridge=ridge)
        without = factorize(A[rest], 1e-9, driver=driver, weights=weights[rest], ridge=ridge)
        np.testing.assert_allclose(with_row.solve(B), without.solve(B[rest]), atol=1e-13)
        assert with_row.rank == without.rank
        if shape == (5, 3):
            np.testing.assert_allclose(
                with_row.standard_errors(B), without.standard_errors(B[rest]), rtol=1e-10
            )
            np.testing.assert_allclose(with_row.gcv(B), without.gcv(B[rest]), rtol=1e-10)


def test_gels(x64):
    """Dependent columns are NaN without a ridge, and a ridge makes the problem regular."""
    rng = np.random.default_rng(5)
    A = rng.standard_normal((2, 6, 3))
    A[0, :, 2] = A[0, :, 0] + A[0, :, 1]
    B = rng.standard_normal((2, 6, 1))
    solve = jax.jit(lambda A, w, r: lstsq(A, B, driver="gels", weights=w, ridge=r).solution)
    for a, f in ((A, B), (A.swapaxes(1, 2), B[:, :3])):
        fun = lambda a, r, f=f: lstsq(a, f, driver="gels", ridge=r).solution  # noqa: E731
        assert np.isnan(fun(a, 0.0)[0]).all()
        assert np.isnan(fun(a, 1e-40)[0]).all()
        expected, *_ = filtered(a, f, np.ones(a.shape[:2]), 1e-3, 0)
        np.testing.assert_allclose(fun(a, 1e-3), expected, atol=1e-10)
    np.testing.assert_array_equal(np.isnan(solve(A, np.ones(6), None)).all((1, 2)), [True, False])


@pytest.mark.parametrize("driver", ["gelsy", *slow("gels", "gelsd")])
def test_bad_weight_or_ridge_poisons_its_element_only(driver, x64):
    rng = np.random.default_rng(6)
    A, B = rng.standard_normal((3, 6, 3)), rng.standard_normal((3, 6, 2))
    weights, ridge = rng.uniform(0.5, 2, (3, 6)), np.array([0.1, 0.2, 0.3])
    fun = jax.jit(
        jax.value_and_grad(
            lambda A, w, r: (lstsq(A, B, driver=driver, weights=w, ridge=r).solution ** 2).sum((1, 2)).sum()
        )
    )
    solve = jax.jit(lambda A, w, r: lstsq(A, B, driver=driver, weights=w, ridge=r).solution)
    clean, gradient = solve(A, weights, ridge), fun(A, weights, ridge)[1]
    for bad in (-1.0, np.nan, np.inf):
        dirty = weights.copy()
        dirty[1, 2] = bad
        for w, r in ((dirty, ridge), (weights, np.array([0.1, bad, 0.3]))):
            x, g = solve(A, w, r), fun(A, w, r)[1]
            assert np.isnan(x[1]).all()
            np.testing.assert_array_equal(x[::2], clean[::2])
            np.testing.assert_array_equal(g[::2], gradient[::2])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda A, b: lstsq(A, b, weights=np.ones(4)), ValueError, r"m of A is 5, the shape of weights is \(4"),
    (lambda A, b: lstsq(A, b, weights=np.float64(1)), ValueError, r"the shape of weights is \(\)"),
    (lambda A, b: factorize(A, weights=np.ones((3, 5))), ValueError, r"\(2,\) of A, \(3,\) of weights"),
    (lambda A, b: factorize(A, weights=np.ones(5) * 1j), TypeError, "weights must be real"),
    (lambda A, b: lstsq(A, b, ridge=np.ones(3)), ValueError, r"\(3,\) of ridge, \(2,\) of A and weights"),
    (lambda A, b: lstsq(A, b, ridge=1j), TypeError, "ridge must be a real number"),
    (lambda A, b: lstsq(A, b[:, :4], ridge=1.0), ValueError, "m of A is 5, of B is 4"),
    (lambda A, b: factorize(A).solve_adjoint(np.ones(4)), ValueError, "n of A is 3, of C is 4"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((2, 5, 3)), np.ones((2, 5, 1)))


def differentiable_outputs(A, B, weights, ridge, rcond, driver):
    x, residuals, _, s = lstsq(A, B, rcond, driver=driver, weights=weights, ridge=ridge)
    return x, residuals, s[:2]


def check_derivatives(A, B, weights, ridge, rcond, driver, outputs=differentiable_outputs, step=1e-5):
    """Gradient and Hessian of a loss of all outputs, in all four arguments, by central differences."""
    rng = np.random.default_rng(9)
    c = problems.right_hand_side(rng, A.shape[1], B.shape[1], A.dtype)

    def loss(arguments):
        x, *others = outputs(*arguments, rcond, driver)
        return (c * x).sum().real + sum((abs(o) ** 2).sum() + o.real.sum() for o in (x, *others))

    def inner(g, d):
        return sum((x * y).sum().real for x, y in zip(jax.tree.leaves(g), jax.tree.leaves(d), strict=True))

    @jax.jit
    def everything(arguments, d):
        gradient, forward = jax.jvp(jax.grad(loss), (arguments,), (d,))
        reverse = jax.grad(lambda a: inner(jax.grad(loss)(a), d))(arguments)
        return loss(arguments), gradient, forward, reverse

    def direction(a):
        return problems.right_hand_side(rng, a.size, 1, a.dtype).reshape(a.shape)

    arguments = jax.tree.map(jnp.asarray, (A, B, weights, ridge))
    d = jax.tree.map(direction, arguments)
    _, gradient, forward, reverse = everything(arguments, d)
    up, down = (everything(jax.tree.map(lambda a, x: a + h * x, arguments, d), d) for h in (step, -step))  # noqa: B023
    scale = 1 + max(np.abs(g).max() for g in jax.tree.leaves((gradient, forward)))
    np.testing.assert_allclose(inner(gradient, d), (up[0] - down[0]) / (2 * step), atol=1e-6 * scale)
    for f, r, u, v in zip(*(jax.tree.leaves(x) for x in (forward, reverse, up[1], down[1])), strict=True):
        np.testing.assert_allclose(f, r, atol=1e-10 * scale)
        np.testing.assert_allclose(f, (u - v) / (2 * step), atol=1e-6 * scale)


@WIDE
def test_derivatives_with_a_cut(driver, shape, x64):
    """A discarded singular value of 0.1; A, B, weights and ridge all move."""
    rng = np.random.default_rng(7)
    A = problems.with_spectrum(rng, *shape, [1, 0.6, 0.1])
    B, weights = rng.standard_normal((shape[0], 2)), rng.uniform(0.8, 1.2, shape[0])
    assert int(lstsq(A, B, 0.35, driver=driver, weights=weights).rank) == 2
    check_derivatives(A, B, weights, np.array(0.3), 0.35, driver)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("s", [[1, 0.6, 0.1], [1, 0.6, 0], [1, 0.8, 0.5]], ids=["cut", "deficient", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_derivatives_sweep(driver, shape, s, dtype, x64):
    if driver == "gels" and s[-1] < 0.5:
        pytest.skip("gels assumes full rank")
    rng = np.random.default_rng(8)
    A = problems.with_spectrum(rng, *shape, s, dtype)
    B, weights = problems.right_hand_side(rng, shape[0], 2, dtype), rng.uniform(0.8, 1.2, shape[0])
    for w, ridge in ((weights, None), (None, np.array(0.3)), (weights, np.array(0.3))):
        check_derivatives(A, B, w, ridge, 0.35 if s[-1] < 0.5 else 1e-3, driver)


@TALL_WIDE
def test_gradient_at_zero(driver, shape, x64):
    """At ridge 0 and weight 0: one-sided differences, since nothing negative is allowed."""
    rng = np.random.default_rng(10)
    A, B = problems.with_spectrum(rng, *shape, [1, 0.8, 0.5]), rng.standard_normal((shape[0], 2))
    weights = rng.uniform(0.8, 1.2, shape[0])
    weights[1] = 0
    # A wide problem without its second row is rank-deficient: rcond holds the rank fixed.
    rcond = 0.1

    def loss(w, r):
        x, residuals, _, s = lstsq(A, B, rcond, driver=driver, weights=w, ridge=r)
        return x.sum() + (x**2).sum() + residuals.sum() + (s[:2] ** 2).sum() + s[:2].sum()

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (by_weight, by_ridge) = both(weights, 0.0)
    h = 1e-5
    towards = np.eye(shape[0])[1]
    for slope, move in [
        (by_ridge, lambda h: (weights, h)),
        (by_weight[1], lambda h: (weights + h * towards, 0.0)),
    ]:
        one_sided = (-3 * value + 4 * both(*move(h))[0] - both(*move(2 * h))[0]) / (2 * h)
        np.testing.assert_allclose(slope, one_sided, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-12, 1.0, 1e6])
def test_every_size_of_ridge_is_accurate(ridge, x64):
    """Within 100 eps times the condition number of [A; sqrt(ridge) I] of the filter, relative to x."""
    rng = np.random.default_rng(11)
    A = problems.with_spectrum(rng, 30, 6, np.logspace(0, -4, 6))
    b = rng.standard_normal(30)
    u, s, vh = np.linalg.svd(A, full_matrices=False)
    x = vh.T @ (s / (s**2 + ridge) * (u.T @ b))
    condition = np.sqrt((s[0] ** 2 + ridge) / (s[-1] ** 2 + ridge))
    error = np.linalg.norm(lstsq(A, b, ridge=ridge).solution - x)
    assert error <= 100 * np.finfo(float).eps * condition * np.linalg.norm(x)
