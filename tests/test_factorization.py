"""`factorize`: every result against its definition, one reduction, derivatives, and as a pytree."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from marks import slow
from test_weights_ridge import TALL_WIDE, check_derivatives, filtered

from jlstsq import factorize, lstsq

DATA = Path(__file__).parent.parent / "examples" / "nist"


def outputs(factors, B, C):
    """Everything that a factorisation offers, as one dictionary."""
    return {
        "solve": factors.solve(B),
        "adjoint": factors.solve_adjoint(C),
        "rank": factors.rank,
        "values": factors.singular_values,
        "condition": factors.condition,
        "pinv": factors.pinv(),
        "covariance": factors.covariance(),
        "leverages": factors.leverages(),
        "loo": factors.loo_residuals(B),
        "gcv": factors.gcv(B),
        "errors": factors.standard_errors(B),
    }


@pytest.mark.parametrize("weighted", [True, *slow(False)], ids=["weights and ridge", "plain"])
@TALL_WIDE
def test_against_the_definitions(driver, shape, weighted, x64):
    """A full and a deficient matrix in one batch, complex."""
    rng = np.random.default_rng(0)
    m, n = shape
    A = np.stack([problems.with_spectrum(rng, m, n, s, complex) for s in ([1, 0.7, 0.4], [1, 0.6, 0])])
    B = problems.right_hand_side(rng, m, 2, complex)
    C = problems.right_hand_side(rng, n, 2, complex)
    weights, ridge = (rng.uniform(0.5, 2, m), 0.3) if weighted else (None, None)
    fun = jax.jit(lambda A, w, r: outputs(factorize(A, 1e-9, driver=driver, weights=w, ridge=r), B, C))
    out = fun(A, weights, ridge)
    w, r = (weights, ridge) if weighted else (np.ones(m), 0.0)
    x, _, rank, values = filtered(A, B, w, r, 1e-9)
    S, *_ = filtered(A, np.eye(m), w, r, 1e-9)
    covariance = (S / w) @ S.conj().swapaxes(1, 2)
    leverages = np.einsum("bij,bji->bi", A, S).real
    rho = (w[:, None] * abs(A @ x - B) ** 2).sum(1)
    last = values[np.arange(2), rank - 1]
    # Without a ridge nothing is left of three rows for three columns: 0 / 0 or 0 / rounding, by machine.
    with np.errstate(divide="ignore", invalid="ignore"):
        gcv = m * rho / (m - leverages.sum(1))[:, None] ** 2
    expected = {
        "solve": x,
        "adjoint": S.conj().swapaxes(1, 2) @ C,
        "rank": rank,
        "values": values,
        "condition": np.hypot(values[:, 0], np.sqrt(r)) / np.hypot(last, np.sqrt(r)),
        "pinv": S,
        "covariance": covariance,
        "leverages": leverages,
        "gcv": gcv,
    }
    for name, value in expected.items():
        if name == "gcv" and not weighted and m == rank[0]:
            value, out[name] = value[1:], out[name][1:]
        np.testing.assert_allclose(out[name], value, atol=1e-11, rtol=1e-11, err_msg=name)
    # leave one out, by leaving one out
    if m > n:
        rest = np.arange(m) != 1
        left, *_ = filtered(A[:1, rest], B[rest], w[rest], r, 1e-9)
        np.testing.assert_allclose(out["loo"][0, 1], B[1] - A[0, 1] @ left[0], atol=1e-11)
    free = (m - rank)[:, None, None]
    variance = np.einsum("bii->bi", covariance).real[:, :, None] * rho[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(free > 0, np.sqrt(variance / free), np.nan)
    np.testing.assert_allclose(out["errors"], errors, atol=1e-12)


@pytest.mark.parametrize("driver", ["gelsy", *slow("gels", "gelsd")])
def test_is_lstsq(driver, x64):
    """Shapes, the vector rule, NaN and values are those of `lstsq`."""
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((2, 1, 5, 3)), rng.standard_normal((1, 4, 5, 2))
    A[1, 0, 0, 0], B[0, 1, 2, 1] = np.nan, np.inf
    for a, b in ((A, B), (A[0, 0], B[0, 0, :, 0]), (A[0].mT, B[0, :, :3])):
        result, again = lstsq(a, b, driver=driver), factorize(a, driver=driver).lstsq(b)
        for x, y in zip(result, again, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.single_first
def test_dtypes(precision):
    A, b = np.array([[1, 0], [0, 2], [1, 1]]), np.array([1, 2, 3])
    full = jnp.zeros(()).dtype
    assert factorize(A).solve(b).dtype == full
    assert factorize(jnp.asarray(A, jnp.bfloat16)).solve(jnp.asarray(b, jnp.bfloat16)).dtype == jnp.bfloat16
    mixed = factorize(A.astype(np.float32), weights=np.ones(3), ridge=1).solve(b.astype(np.complex64))
    assert mixed.dtype == np.complex64
    with jax.numpy_dtype_promotion("strict"):
        real = A.astype(np.float32)
        factorize(real, weights=np.ones(3, np.float32), ridge=0.5).standard_errors(b.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 2)])
def test_empty(shape):
    A = jnp.ones(shape)
    for kwargs in ({}, {"weights": jnp.ones(shape[-2]), "ridge": 1.0}):
        factors = factorize(A, **kwargs)
        out = outputs(factors, jnp.ones((shape[-2], 2)), jnp.ones((shape[-1], 2)))
        assert out["solve"].shape == (*shape[:-2], shape[-1], 2)
        assert out["pinv"].shape == (*shape[:-2], shape[-1], shape[-2])
        assert not np.asarray(out["rank"]).any()


def test_pytree(x64):
    """Through jit, scan, checkpoint, vmap, donation, and saved and restored."""
    rng = np.random.default_rng(2)
    A, B = rng.standard_normal((6, 3)), rng.standard_normal((4, 6))
    factors = factorize(A, ridge=0.1)
    expected = jax.vmap(factors.solve)(B)
    _, scanned = jax.lax.scan(lambda f, b: (f, f.solve(b)), factors, B)
    np.testing.assert_allclose(scanned, expected, rtol=1e-13)
    leaves, structure = jax.tree.flatten(factors)
    restored = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
    np.testing.assert_allclose(restored.solve(B[0]), expected[0], rtol=1e-13)
    many = jax.vmap(lambda s: factorize(s * A, ridge=0.1))(jnp.array([1.0, 2.0]))
    assert many.matrix.shape == (2, 6, 3)
    donated = jax.jit(lambda f: f, donate_argnums=0, keep_unused=True)(many)
    np.testing.assert_allclose(donated.solve(B[0])[0], expected[0], rtol=1e-13)


def calls(fun, *args):
    text = jax.jit(fun).lower(*args).compile().as_text()
    assert "f64[300,300" not in text
    lines = [line for line in text.splitlines() if 'custom_call_target="lapack_dgeqrf' in line]
    return [line for line in lines if "300," in line]


@pytest.mark.cpu
def test_one_reduction(x64):
    """A thousand ridges reduce A once, with the GCV score and its gradient as well; weights, twice."""
    A, b = jnp.ones((300, 7)), jnp.ones(300)
    ridges = jnp.linspace(0.1, 1, 1000)
    paths = (
        jax.vmap(lambda A, r: lstsq(A, b, ridge=r), (None, 0)),
        lambda A, r: jax.vmap(lambda r, f=factorize(A): f.with_ridge(r).gcv(b))(r),
        lambda A, r: jax.vmap(jax.grad(lambda r: factorize(A, ridge=r).gcv(b).sum()))(r[:5]),
        lambda A, r: jax.grad(lambda A: lstsq(A, b, ridge=r[0]).solution.sum())(A),
    )
    for path in paths:
        (line,) = calls(path, A, ridges)
        assert "[1000," not in line
    assert len(calls(lambda A, w: lstsq(A, b, weights=w).solution, A, b)) == 2


def differentiable_outputs(A, B, weights, ridge, rcond, driver):
    factors = factorize(A, rcond, driver=driver, weights=weights, ridge=ridge)
    C = jnp.ones((A.shape[1], 1), A.dtype)
    extra = (factors.gcv(B), factors.loo_residuals(B)) if ridge is not None else ()
    return factors.solve(B), factors.solve_adjoint(C), factors.covariance(), factors.leverages(), *extra


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights and ridge"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_derivatives(driver, shape, weighted, x64):
    """Second order, with a discarded singular value of 0.1, in every argument that there is."""
    rng = np.random.default_rng(3)
    A = problems.with_spectrum(rng, *shape, [1, 0.6, 0.1])
    B = rng.standard_normal((shape[0], 2))
    weights, ridge = (rng.uniform(0.8, 1.2, shape[0]), np.array(0.3)) if weighted else (None, None)
    check_derivatives(A, B, weights, ridge, 0.35, driver, differentiable_outputs)


@pytest.mark.parametrize("shape", [(5, 3), *slow((3, 5))], ids=["tall", "wide"])
def test_gradient_is_that_of_lstsq(shape, x64):
    """Also through checkpoint, and where the factorisation is made and used twice."""
    rng = np.random.default_rng(4)
    A, b = rng.standard_normal(shape), rng.standard_normal(shape[0])

    def direct(A):
        return (lstsq(A, b).solution ** 3).sum()

    def factored(A):
        factors = factorize(A)
        return (factors.solve(b) * factors.solve(2 * b) * factors.solve(b / 2)).sum()

    one, two = jax.jit(jax.grad(direct))(A), jax.jit(jax.grad(jax.checkpoint(factored)))(A)
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-10)


def test_standard_errors_without_freedom(x64):
    assert np.isnan(factorize(np.eye(3)).standard_errors(np.ones(3))).all()
    weights = np.array([1.0, 1, 0, 0])
    assert np.isnan(factorize(np.eye(4, 2), weights=weights).standard_errors(np.ones(4))).all()
    # rank 1 of 2: two rows of three are free
    assert np.isfinite(factorize(np.ones((3, 2))).standard_errors(np.arange(3.0))).all()


DIGITS = {
    "longley": 11, "norris": 13, "pontius": 12, "wampler3": 13, "wampler4": 13, "wampler5": 13, "filip": 7,
    "noint1": 14, "noint2": 14,
}  # fmt: skip


@functools.cache
def _certified():
    return json.loads((DATA / "certified.json").read_text())


@pytest.mark.parametrize("name", DIGITS)
def test_nist_standard_errors(name, x64):
    certified = _certified()[name]
    errors = np.array([float(v) for v in certified["standard_errors"]])
    rows = np.genfromtxt(DATA / f"{name}.csv", delimiter=",", skip_header=1)
    y, x = rows[:, 0], rows[:, 1:]
    if "no intercept" in certified["model"]:
        A = x
    elif x.shape[1] == 1:
        A = np.vander(x[:, 0], len(errors), increasing=True)
    else:
        A = np.column_stack([np.ones(len(y)), x])
    found = factorize(A, 1e-17).standard_errors(y)
    assert -np.log10(np.max(np.abs(found - errors) / errors) + 1e-17) >= DIGITS[name]
