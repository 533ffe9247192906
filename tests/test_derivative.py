"""Derivatives: against finite differences, in every mode, at every rank."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.test_util import check_grads

from jlstsq import lstsq

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
SHAPES = {"tall": (5, 3), "square": (3, 3), "wide": (3, 5)}


def differentiable_outputs(A, B, rcond, driver):
    result = lstsq(A, B, rcond, driver=driver)
    return result.solution, result.residuals


def check_derivatives(A, B, rcond, driver, seed=9, step=1e-5, tolerance=1e-6):
    """Gradient and Hessian-vector products of one loss: forward, reverse over reverse, differences.

    One compiled function for all of it, so that a case costs one compilation.
    """
    rng = np.random.default_rng(seed)
    c = problems.right_hand_side(rng, A.shape[1], B.shape[1], A.dtype)

    def loss(AB):
        x, residuals = differentiable_outputs(*AB, rcond, driver)
        return (c * x).sum().real + (abs(x) ** 2).sum() + (residuals**2).sum() + residuals.sum()

    def inner(g, d):
        return sum((x * y).sum().real for x, y in zip(g, d, strict=True))

    @jax.jit
    def everything(AB, d):
        value, gradient = jax.value_and_grad(loss)(AB)
        _, forward = jax.jvp(jax.grad(loss), (AB,), (d,))
        reverse = jax.grad(lambda AB: inner(jax.grad(loss)(AB), d))(AB)
        return value, inner(gradient, d), gradient, forward, reverse

    # Two directions, one of which is not used elsewhere: d' H d = d H d' is the Hessian's symmetry.
    AB = (jnp.asarray(A), jnp.asarray(B))
    d, other = (
        tuple(jnp.asarray(problems.right_hand_side(rng, *a.shape, a.dtype)) for a in (A, B)) for _ in range(2)
    )
    _, slope, gradient, forward, reverse = everything(AB, d)
    above, below = (
        everything(tuple(a + h * x for a, x in zip(AB, d, strict=True)), d) for h in (step, -step)
    )
    scale = 1 + max(np.abs(g).max() for g in gradient + forward)
    np.testing.assert_allclose(slope, (above[0] - below[0]) / (2 * step), atol=tolerance * scale)
    for f, r, up, down in zip(forward, reverse, above[2], below[2], strict=True):
        np.testing.assert_allclose(f, r, atol=1e-10 * scale)
        np.testing.assert_allclose(f, (up - down) / (2 * step), atol=tolerance * scale)
    swapped = everything(AB, other)[3]
    np.testing.assert_allclose(inner(forward, other), inner(swapped, d), atol=1e-10 * scale)


@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("driver", DRIVERS[:3])
def test_full_rank(driver, shape, dtype, x64):
    rng = np.random.default_rng(0)
    A = problems.with_spectrum(rng, *shape, [1, 0.7, 0.4], dtype)
    check_derivatives(A, problems.right_hand_side(rng, shape[0], 2, dtype), None, driver)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("s", [[1, 0.6, 0.1], [1, 0.6, 0]], ids=["cut", "deficient"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_truncated_in_every_direction(driver, shape, s, dtype, x64):
    """A discarded value of 0.1, and an exactly deficient A, perturbed in every direction."""
    rng = np.random.default_rng(1)
    A = problems.with_spectrum(rng, *shape, s, dtype)
    assert int(lstsq(A, A, 0.35, driver=driver).rank) == 2
    check_derivatives(A, problems.right_hand_side(rng, shape[0], 2, dtype), 0.35, driver)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_check_grads(driver, shape, x64):
    """JAX's own checker on A = U V of fixed rank, orders 1 and 2, forward and reverse."""
    rng = np.random.default_rng(6)
    rank = 3 if driver == "gels" else 2
    U, V = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    B = rng.standard_normal((shape[0], 2))
    fun = jax.jit(lambda U, V, B: differentiable_outputs(U @ V, B, 1e-9, driver))
    check_grads(fun, (U, V, B), 2, modes=["fwd", "rev"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
@pytest.mark.parametrize("kind", ["eye", "zero", "duplicated", "exact fit"])
def test_finite(driver, kind, x64):
    rng = np.random.default_rng(3)
    A = {"eye": np.eye(5, 3), "zero": np.zeros((5, 3)), "duplicated": np.ones((5, 3))}.get(
        kind, rng.standard_normal((5, 3))
    )
    B = A @ np.ones((3, 2)) if kind == "exact fit" else rng.standard_normal((5, 2))

    def loss(A):
        x, residuals = differentiable_outputs(A, B, None, driver)
        s = lstsq(A, B, driver=driver).singular_values
        return (x**2).sum() + residuals.sum() + s.sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(A)).all()
    assert np.isfinite(jax.jit(jax.hessian(loss))(A)).all()
    if kind == "exact fit":
        rho = jax.grad(lambda A: lstsq(A, B, driver=driver).residuals.sum())(A)
        np.testing.assert_allclose(rho, 0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values(shape, dtype, x64):
    rng = np.random.default_rng(4)
    A = problems.with_spectrum(rng, *shape, [1, 0.7, 0.4], dtype)
    fun = jax.jit(lambda A: lstsq(A, A[:, :1], driver="gelsd").singular_values)
    check_grads(fun, (A,), 2, modes=["fwd", "rev"], rtol=1e-4, atol=1e-4)


def test_singular_values_at_ties(x64):
    """The sum of squares of tied values is smooth: its gradient is 2 A."""
    A = np.eye(5, 3)
    gradient = jax.grad(lambda A: (lstsq(A, A[:, :1], driver="gelsd").singular_values ** 2).sum())(A)
    np.testing.assert_allclose(gradient, 2 * A, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_right_hand_side_alone(driver, shape, x64):
    """The derivative in B with A constant is the pseudoinverse, truncated where the solution is."""
    rng = np.random.default_rng(8)
    A = problems.with_spectrum(rng, *shape, [1, 0.6, 0.1])
    rcond = 1e-3 if driver in ("gels", "gelsy") else 0.35
    jacobian = jax.jit(jax.jacrev(lambda b: lstsq(A, b, rcond, driver=driver).solution))
    np.testing.assert_allclose(jacobian(np.ones(shape[0])), np.linalg.pinv(A, rcond=rcond), atol=1e-12)


def test_rank_and_rcond_have_no_derivative(x64):
    A, B = np.eye(4, 3), np.ones((4, 1))
    result, tangent = jax.jvp(lambda A, r: lstsq(A, B, r), (A, 1e-3), (A, 1.0))
    assert tangent.rank.dtype == jax.dtypes.float0
    assert result.rank == 3
    assert jax.grad(lambda r: lstsq(A, B, r).solution.sum())(1e-3) == 0


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_neighbour_leaves_gradients_alone(driver, bad, x64):
    rng = np.random.default_rng(5)
    A, B = rng.standard_normal((3, 6, 3)), rng.standard_normal((3, 6, 2))
    fun = jax.jit(jax.grad(lambda A: (lstsq(A, B, driver=driver).solution ** 2).sum()))
    poisoned = A.copy()
    poisoned[1, 2, 1] = bad
    clean, dirty = fun(A), fun(poisoned)
    np.testing.assert_array_equal(clean[::2], dirty[::2])
    assert np.isnan(dirty[1]).any()


def test_one_factorisation(x64):
    """Value and gradient hold one factorisation of m x n data."""
    A, B = jnp.ones((300, 7)), jnp.ones((300, 2))
    for driver in DRIVERS:
        fun = jax.value_and_grad(lambda A, d=driver: lstsq(A, B, driver=d).solution.sum())
        text = jax.jit(fun).lower(A).compile().as_text()
        calls = [line for line in text.splitlines() if "custom-call(" in line]
        factorisations = [line for line in calls if 'custom_call_target="lapack_dgeqrf' in line]
        assert sum("f64[300," in line for line in factorisations) == 1
        assert not any("gesdd" in line and "f64[300," in line for line in calls)
        if driver in ("gels", "gelsy"):
            assert "gesdd" not in text
        assert "f64[300,300" not in text


def test_training_loop_stays_finite(x64):
    """10 000 steps of gradient descent through a rank-deficient read-out."""
    t = jnp.linspace(0, 1, 12)
    y = jnp.sin(3 * t)

    def loss(theta):
        features = jnp.stack([jnp.exp(-theta[0] * t), jnp.exp(-theta[0] * t), jnp.cos(theta[1] * t)], -1)
        result = lstsq(features, y, 1e-8)
        return result.residuals.sum() + 1e-3 * (result.solution**2).sum()

    def step(theta, _):
        value, gradient = jax.value_and_grad(loss)(theta)
        return theta - 0.05 * gradient, value

    theta, values = jax.jit(lambda th: jax.lax.scan(step, th, length=10_000))(jnp.array([1.0, 2.0]))
    assert np.isfinite(theta).all()
    assert np.isfinite(values).all()
    assert values[-1] < values[0]
