"""One contract for all drivers: driver x shape x spectrum x dtype, checked by identities."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from marks import slow

from jlstsq import LstsqResult, lstsq

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
RANKED = DRIVERS[1:]
SHAPES = {"tall": (12, 5), "square": (5, 5), "wide": (5, 12)}
SPECTRA = ("well", "graded", "deficient", "equal", "zero")
DTYPES = ("float32", *slow("float64", "complex64", "complex128"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_contract(driver, shape, kind, dtype):
    if driver == "gels" and kind in ("deficient", "zero"):
        pytest.skip("gels assumes full rank")
    rng = np.random.default_rng(0)
    m, n = shape
    p, k = min(shape), 3
    s = problems.spectrum(kind, p)
    with jax.enable_x64(dtype in ("float64", "complex128")):
        A = problems.with_spectrum(rng, m, n, s, np.dtype(dtype)).astype(dtype)
        B = problems.right_hand_side(rng, m, k, np.dtype(dtype)).astype(dtype)
        result = lstsq(A, B, driver=driver)
        assert isinstance(result, LstsqResult)
        real = np.finfo(dtype).dtype
        eps = np.finfo(dtype).eps
        rank = int((s > 0).sum())
        kappa = 1.0 if rank == 0 else s[0] / s[rank - 1]
        tolerance = 20 * max(m, n) * eps * kappa

        x, residuals, found, values = result
        chex.assert_shape(x, (n, k))
        chex.assert_type(x, dtype)
        chex.assert_type(residuals, real)
        chex.assert_shape(residuals, (k,) if m > n else (0,))
        chex.assert_shape(found, (0,) if driver == "gels" else ())
        chex.assert_shape(values, (p,) if driver in ("gelsd", "gelss") else (0,))

        A, B, x = (np.asarray(a, np.complex128) for a in (A, B, x))
        # normal equations, minimum norm (x in the range of A^H), the definition
        r = B - A @ x
        assert np.abs(A.conj().T @ r).max() <= tolerance * np.abs(B).max()
        pinv = np.linalg.pinv(A, rcond=1e-5)
        np.testing.assert_allclose(x - pinv @ (A @ x), 0, atol=tolerance * (1 + np.abs(x).max()))
        np.testing.assert_allclose(x, pinv @ B, atol=tolerance * kappa * (1 + np.abs(x).max()))
        if m > n:
            np.testing.assert_allclose(residuals, (np.abs(r) ** 2).sum(0), rtol=1e2 * tolerance)
        if driver in RANKED:
            assert int(found) == rank
        if driver in ("gelsd", "gelss"):
            np.testing.assert_allclose(values, s, atol=20 * max(m, n) * eps)


@pytest.mark.parametrize("driver", ["gels", "gelsd", *slow("gelsy", "gelss")])
@pytest.mark.parametrize("case", [
    # A, B, solution, residuals, rank
    ((2, 1, 5, 3), (1, 4, 5, 2), (2, 4, 3, 2), (2, 4, 2), (2, 1)),
    ((2, 5, 3), (5, 2), (2, 3, 2), (2, 2), (2,)),
    ((5, 3), (2, 5, 1), (2, 3, 1), (2, 1), ()),
    ((5, 5, 3), (5, 2), (5, 3, 2), (5, 2), (5,)),
    ((5, 5, 3), (5, 5), (5, 3), (5, 1), (5,)),
    ((3, 3, 3), (3, 3), (3, 3), (0,), (3,)),
    ((5, 3), (5,), (3,), (1,), ()),
    ((2, 3, 5), (2, 3), (2, 5), (0,), (2,)),
    ((2, 1, 3, 5), (1, 4, 3, 2), (2, 4, 5, 2), (0,), (2, 1)),
    ((2, 5, 3), (5,), (2, 3), (2, 1), (2,)),
], ids=lambda c: str(c[:2]))  # fmt: skip
def test_batches(driver, case, x64):
    a_shape, b_shape, x_shape, residual_shape, batch = case
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
    result = lstsq(A, B, driver=driver)
    p = min(a_shape[-2:])
    chex.assert_shape(result.solution, x_shape)
    chex.assert_shape(result.residuals, residual_shape)
    chex.assert_shape(result.rank, (0,) if driver == "gels" else batch)
    values_shape = (*batch, p) if driver in ("gelsd", "gelss") else (0,)
    chex.assert_shape(result.singular_values, values_shape)
    vector = b_shape == a_shape[:-1] or len(b_shape) == 1
    expected = np.linalg.pinv(A) @ (B[..., None] if vector else B)
    expected = expected[..., 0] if vector else expected
    np.testing.assert_allclose(result.solution, expected, atol=1e-11)


@pytest.mark.parametrize("driver", ["gelsy", *slow("gels", "gelsd", "gelss")])
@pytest.mark.parametrize("shapes", [
    ((0, 3), (0, 2)), ((3, 0), (3, 2)), ((5, 3), (5, 0)), ((0, 5, 3), (0, 5, 2)), ((1, 5, 3), (0, 5, 2)),
    ((2, 0, 3), (2, 0)), ((0, 0), (0, 1)),
], ids=str)  # fmt: skip
def test_empty(driver, shapes):
    a_shape, b_shape = shapes
    A, B = jnp.ones(a_shape) + jnp.eye(*a_shape[-2:]), 2 * jnp.ones(b_shape)
    result = lstsq(A, B, driver=driver)
    m, n = a_shape[-2:]
    vector = b_shape == a_shape[:-1]
    batch = np.broadcast_shapes(a_shape[:-2], b_shape[: -1 if vector else -2])
    k = () if vector else b_shape[-1:]
    chex.assert_shape(result.solution, (*batch, n, *k))
    chex.assert_tree_all_finite(result)
    if n == 0 and m > 0:
        np.testing.assert_allclose(result.residuals, 4.0 * m)
    if driver != "gels":
        assert (np.asarray(result.rank) == min(m, n)).all()
    assert jax.grad(lambda a: lstsq(a, B, driver=driver).solution.sum())(A).shape == A.shape


@pytest.mark.single_first
def test_dtypes(precision):
    full = jnp.zeros(()).dtype
    A, B = np.array([[1, 0], [0, 2], [1, 1]]), np.array([1, 2, 3])
    x = lstsq(A, B).solution
    assert x.dtype == full
    np.testing.assert_allclose(x, np.linalg.lstsq(A, B)[0], rtol=1e-5)
    assert lstsq(A.astype(bool), B).solution.dtype == full
    for half in (jnp.float16, jnp.bfloat16):
        result = lstsq(jnp.asarray(A, half), jnp.asarray(B, half), driver="gelsd")
        assert result.solution.dtype == result.residuals.dtype == result.singular_values.dtype == half
    mixed = lstsq(A.astype(np.float32), B.astype(np.complex64))
    assert mixed.solution.dtype == np.complex64
    assert mixed.residuals.dtype == np.float32


@pytest.mark.single_first
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("dtype", ["float32", *slow("complex64")])
def test_strict_promotion(driver, dtype, precision):
    A = np.eye(4, 3).astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        jax.vjp(lambda A: lstsq(A, A, driver=driver)[:2], A)[1](lstsq(A, A, driver=driver)[:2])


@pytest.mark.parametrize("driver", RANKED)
def test_rcond(driver, x64):
    rng = np.random.default_rng(2)
    A = np.stack([problems.with_spectrum(rng, 6, 4, [1, 0.5, 1e-3, 1e-6]) for _ in range(3)])
    B = rng.standard_normal((3, 6, 2))

    def given(rcond):
        # A program for each kind of number: of gelsd.
        return rcond if driver != "gelsy" or rcond is None else np.full(3, rcond, float)

    for rcond, ranks in [
        (None, [4, 4, 4]),
        (1e-4, [3, 3, 3]),
        (np.float32(1e-2), [2, 2, 2]),
        (np.array([1e-8, 1e-4, 0.9]), [4, 3, 1]),
        (-1, [4, 4, 4]),
        (0, [4, 4, 4]),
        (1, [0, 0, 0]),
        (2.5, [0, 0, 0]),
    ]:
        result = lstsq(A, B, given(rcond), driver=driver)
        np.testing.assert_array_equal(result.rank, ranks)
        if max(ranks) == 0:
            assert not np.asarray(result.solution).any()
            np.testing.assert_allclose(result.residuals, (B**2).sum(1))
    nan = lstsq(A, B, given(np.nan), driver=driver)
    assert np.isnan(nan.solution).all()
    assert not np.asarray(nan.rank).any()
    traced = jax.jit(lambda r: lstsq(A, B, r, driver=driver).rank)(1e-4)
    np.testing.assert_array_equal(traced, [3, 3, 3])
    assert lstsq(A.astype(np.float32), B.astype(np.float32), 1e-4).solution.dtype == np.float32


def test_rcond_default_beyond_one(x64):
    # eps * m reaches 1 in float32 beyond 8 million rows: eps then, and the rank is right.
    from jlstsq._arguments import resolve_rcond

    assert float(resolve_rcond(None, (9_000_000, 1), np.float32)) == np.finfo(np.float32).eps
    assert float(resolve_rcond(None, (100, 7), np.float32)) == np.float32(100 * np.finfo(np.float32).eps)


def test_names_and_values_do_not_recompile():
    A, B = np.eye(4, 3, dtype=np.float32), np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(lstsq(A, B, driver="GELSD")[0], lstsq(A, B, driver="gelsd")[0])
    lstsq(A, B, 0.1)
    before = lstsq._cache_size()
    lstsq(A, B, 0.2)
    assert lstsq._cache_size() == before


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: lstsq(np.ones((5, 3)), np.ones((4, 2))), ValueError, "m of A is 5, of B is 4"),
    (lambda: lstsq(np.ones((5, 3)), np.ones(4)), ValueError, "m of A is 5, of B is 4"),
    (lambda: lstsq(np.ones((2, 5, 3)), np.ones((3, 5, 2))), ValueError, r"\(2,\) of A, \(3,\) of B"),
    (lambda: lstsq(np.ones(5), np.ones(5)), ValueError, r"at least 2 dimensions, got shape \(5,\)"),
    (lambda: lstsq(np.ones((5, 3)), np.float32(1)), ValueError, "got a scalar"),
    (lambda: lstsq(np.eye(3), np.ones(3), driver="qr"), ValueError, "gels, gelsy, gelsd, gelss"),
    (lambda: lstsq(np.eye(3), np.ones(3), driver=5), ValueError, "gels, gelsy, gelsd, gelss"),
    (lambda: lstsq([[1.0]], np.ones(1)), TypeError, "A must be a NumPy or JAX array, got list"),
    (lambda: lstsq(np.eye(3), np.ones(3), 1j), TypeError, "rcond must be a real number"),
    (lambda: lstsq(np.ones((2, 3, 3)), np.ones((2, 3)), np.ones(3)), ValueError, r"\(3,\) of rcond, \(2,\)"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(40000, 9, 9), (300, 5, 2), (300, 2, 5), (7, 30, 10)], ids=str)
@pytest.mark.parametrize("driver", ["gelsd", *slow("gels")])
def test_no_right_hand_sides(shape, driver):
    """Also in batches that are solved in blocks or in lanes."""
    A, B = jnp.zeros(shape), jnp.zeros((*shape[:-1], 0))

    def solution(A, B):
        return lstsq(A, B, driver=driver).solution

    assert jax.eval_shape(solution, A, B).shape == (shape[0], shape[2], 0)
    gradient = jax.eval_shape(jax.grad(lambda A, B: solution(A, B).sum(), (0, 1)), A, B)
    assert [g.shape for g in gradient] == [A.shape, B.shape]
