"""The fast paths accept nothing that the careful path does better; its own variants agree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import scipy.linalg
from marks import slow

from jlstsq import _fast, factorize, lstsq
from jlstsq._factors import factorise
from jlstsq._numerics import in_double
from jlstsq._reduce import cholesky, householder, sketch

KAPPAS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e12)


def problem(rng, m, p, kappa, dtype, noise=0.1):
    """A of the given condition number, badly scaled columns included, and b with a residual."""
    A = problems.with_spectrum(rng, m, p, np.logspace(0, -np.log10(kappa), p)).astype(dtype)
    x = rng.standard_normal(p) / np.linalg.norm(A.astype(float), axis=0)
    b = A @ x + noise * rng.standard_normal(m)
    return A, b.astype(dtype)


def attempt_at(driver, wide, A, b):
    """The attempt with nothing truncated, as arrays alone."""
    out = _fast.attempt(driver, wide, A, b, jnp.zeros(A.shape[:-2], jnp.finfo(A.dtype).dtype))
    return out and out._replace(singular_values=None, reduced=None)


@pytest.mark.single_first
@pytest.mark.parametrize("shape", [(400, 20), (20, 3), (7, 1), (50, 50)], ids=str)
def test_accepted_solutions_are_right(shape, precision):
    """Over a sweep of condition numbers: where the fast path says solved, Wedin's bound holds."""
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    m, p = shape
    drawn = [problem(rng, m, p, kappa, dtype) for kappa in KAPPAS for _ in range(4)]
    A, b = (np.stack(x) for x in zip(*drawn, strict=True))
    attempt = jax.jit(partial(attempt_at, "gels", False))
    if attempt_at("gels", False, A, b[..., None]) is None:
        pytest.skip("no fast path for this shape and precision")
    result = attempt(A, b[..., None])
    solved = np.asarray(result.solved)
    assert solved[:4].all()
    for i in np.flatnonzero(solved):
        exact, rhs = A[i].astype(float), b[i].astype(float)
        x = scipy.linalg.lstsq(exact, rhs, cond=1e-15, lapack_driver="gelsd")[0]
        s = np.linalg.svd(exact, compute_uv=False)
        kappa, residual = s[0] / s[-1], np.linalg.norm(rhs - exact @ x)
        bound = 4 * p * eps * kappa * (np.linalg.norm(x) + residual / s[-1])
        assert np.linalg.norm(result.solution[i][:, 0] - x) <= bound
        assert result.condition[i] * 1.001 >= kappa * (1 - 1e3 * eps * kappa)


@pytest.mark.parametrize("dtype", ["float32", *slow("float64", "complex128")])
def test_one_large_matrix(dtype, x64):
    """Without an inverse triangle: every bound is one, and what is solved is right, tall and wide."""
    p, eps, cpu = 260, np.finfo(dtype).eps, jax.default_backend() == "cpu"
    m = 4 * p if dtype == "float32" else 2 * p
    rng = np.random.default_rng(3)
    assert cholesky.worthwhile((m, p), dtype)
    factor = jax.jit(lambda A: cholesky.factor(A, explicit=False))
    attempts = [jax.jit(partial(attempt_at, "gelsd", wide)) for wide in (False, True)]
    solves = jax.jit(lambda A, b: lstsq(A, b, driver="gelsd"))
    accepted = []
    for kappa in KAPPAS:
        A = problems.with_spectrum(rng, m, p, np.logspace(0, -np.log10(kappa), p), dtype)
        A = (A * np.logspace(0, 3, p)).astype(dtype)
        x, v = (problems.right_hand_side(rng, rows, 1, dtype) for rows in (p, m))
        b = (A @ x + 0.1 * v).astype(dtype)
        exact = A.astype(np.result_type(dtype, np.float64))
        gram = factor(A)
        assert gram.inverse is None
        accepted.append(bool(gram.accepted))
        if not gram.accepted:
            continue
        norms = np.linalg.norm(exact, axis=0)
        triangle, s = np.asarray(gram.triangle).astype(exact.dtype), np.linalg.svd(exact, compute_uv=False)
        if gram.triangle_low is not None:
            triangle = triangle + np.asarray(gram.triangle_low).astype(exact.dtype)
        inverse = np.linalg.inv(triangle)
        assert gram.inverse_norm * (1 + 1e-4) >= np.linalg.norm(inverse * norms[:, None], 2)
        left = inverse.conj().T @ (exact.conj().T @ exact) @ inverse - np.eye(p)
        assert np.linalg.norm(left, 2) <= gram.contraction
        assert gram.condition * (1 + 1e-4) >= s[0] / s[-1]
        for wide, rhs in ((False, b), (True, (x * norms[:, None]).astype(dtype))):
            result = attempts[wide](A, rhs)
            if not result.solved:
                assert kappa > (10 if dtype == "float32" else 1e4)
                continue
            matrix = exact.conj().T if wide else exact
            best = scipy.linalg.lstsq(matrix, rhs.astype(exact.dtype), cond=eps * 1e-3)[0]
            rest = 0 if wide else np.linalg.norm(b - exact @ best)
            bound = 4 * p * eps * s[0] / s[-1] * (np.linalg.norm(best) + rest / s[-1])
            assert np.linalg.norm(result.solution - best) <= bound
        found = solves(A, b).singular_values
        assert abs(found - s).max() <= (20 if cpu else 60) * eps * s[0]  # cuSOLVER: 13 at p = 500
    assert all(accepted[: 2 if cpu or dtype != "float32" else 1])  # float32 in double: on CPU
    assert not accepted[-1]


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("shape", [(9000, 70), (1000, 70), (2, 200, 70)], ids=str)
def test_gram_matrix_in_double(shape, dtype):
    """Block by block, in one piece and in a batch, the adjoint conjugated."""
    rng = np.random.default_rng(10)
    A = problems.right_hand_side(rng, int(np.prod(shape[:-1])), shape[-1], dtype).reshape(shape).astype(dtype)
    gram = jax.jit(cholesky.factor)(A)
    exact = A.astype(np.complex128)
    exact = exact.conj().mT @ exact
    r = np.asarray(gram.triangle).astype(np.complex128)
    scale = 1e-6 * abs(exact).max()
    np.testing.assert_allclose(r.conj().mT @ r, exact, atol=scale)
    assert np.asarray(gram.accepted).all()


@pytest.mark.cpu
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_double_sums_lose_no_digit_of_single_precision(batch, precision):
    """Ill-conditioned float32 data with and without a residual: accepted, not behind LAPACK in float32."""
    m, p, kappas = 1000, 80, (1e1, 1e2, 1e3, 3e3)
    assert in_double((*batch, m, p), np.float32)
    assert not in_double((*batch, m, p), np.float64)
    rng = np.random.default_rng(6)
    attempt = jax.jit(partial(attempt_at, "gels", False))
    for kappa in kappas:
        for noise in (0.0, 0.1):
            A, b = problem(rng, m, p, kappa, np.float32, noise)
            result = attempt(np.broadcast_to(A, (*batch, m, p)), np.broadcast_to(b[:, None], (*batch, m, 1)))
            assert np.asarray(result.solved).all()
            exact = np.linalg.lstsq(A.astype(float), b.astype(float))[0]
            theirs = scipy.linalg.lstsq(A, b, cond=1e-7, lapack_driver="gelsy")[0]
            assert theirs.dtype == np.float32
            size = np.linalg.norm(exact)
            error = np.linalg.norm(np.asarray(result.solution)[..., 0] - exact, axis=-1)
            rounding = 2 * np.finfo(np.float32).eps * size
            assert (error <= 2 * np.linalg.norm(theirs - exact) + rounding).all()


@pytest.mark.single_first
@pytest.mark.parametrize("shape", [(60, 9), *slow((9, 60))], ids=str)
def test_accepted_gradients_are_right(shape, precision, monkeypatch):
    """Over a sweep of condition numbers: without Q as accurate as with Q, to the gradient's own rounding."""
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(2)
    eps = np.finfo(dtype).eps
    tall = shape[0] > shape[1]
    drawn = [problem(rng, max(shape), min(shape), kappa, dtype)[0] for kappa in KAPPAS]
    A = np.stack(drawn if tall else [a.T for a in drawn])
    b, w = (rng.standard_normal(rows).astype(dtype) for rows in shape)

    def gradients():
        def one(A):
            return jax.grad(lambda A: lstsq(A, b, driver="gels").solution @ w)(A)

        return np.asarray(jax.jit(jax.vmap(one))(A))

    without_q = gradients()
    rhs = np.broadcast_to(b[:, None], (len(A), len(b), 1))
    factored = factorise("gels", not tall)(A if tall else A.mT, np.zeros(len(A), dtype), rhs)
    accepted = factored.gram.accepted
    assert np.asarray(accepted)[:3].all()
    assert not np.asarray(accepted)[-1]
    jax.clear_caches()
    monkeypatch.setattr(cholesky, "worthwhile", lambda *_: False)
    with_q = gradients()
    jax.clear_caches()
    for kappa, good, x, y in zip(KAPPAS, np.asarray(accepted), without_q, with_q, strict=True):
        if good:
            assert np.linalg.norm(x - y) <= 20 * eps * kappa * np.linalg.norm(y)


@pytest.mark.single_first
@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (20, 3), (3, 20), (7, 1), (1, 7)], ids=str)
def test_singular_values_are_backward_stable(shape, precision):
    """Also those of the second pass over the data, at every condition number."""
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(1)
    A = np.stack(
        [problem(rng, *shape, kappa, dtype)[0] for kappa in KAPPAS if shape[0] > shape[1]]
        or [problem(rng, shape[1], shape[0], kappa, dtype)[0].T for kappa in KAPPAS]
    )
    s = np.asarray(lstsq(A, A[..., :1], driver="gelsd").singular_values)
    exact = np.linalg.svd(A.astype(float), compute_uv=False)
    # CUDA's SVD of a batch is right to about 4 eps a column only; QR iteration, for single ones, is a loop.
    units = 20 if jax.default_backend() == "cpu" else max(20, 5 * min(shape))
    assert (abs(s - exact).max(-1) <= units * np.finfo(dtype).eps * exact[:, 0]).all()
    alone = np.asarray(lstsq(A[5], A[5, :, :1], driver="gelsd").singular_values)
    assert abs(alone - exact[5]).max() <= 20 * np.finfo(dtype).eps * exact[5, 0]


@pytest.mark.single_first
@pytest.mark.parametrize("kappa", [1e1, 1e5, 1e12])
def test_sketch_is_as_good_as_householder(kappa, precision):
    dtype = np.float64 if precision else np.float32
    eps = np.finfo(dtype).eps
    rng = np.random.default_rng(2)
    m, p = 4000, 20
    A, b = problem(rng, m, p, kappa, dtype)
    assert sketch.worthwhile(A.shape)
    factors = jax.jit(sketch.precondition)(A)
    q, r = (np.asarray(x, float) for x in jax.jit(sketch.orthonormal)(factors))
    exact = A.astype(float)
    if factors.accepted:
        # Orthonormal where R is not zero: rows of R that would be rounding are, and so is Q there.
        gram, size = q.T @ q, 40 * p * eps
        assert np.linalg.norm(gram @ gram - gram) < size
        assert np.linalg.norm(gram - np.eye(p)) < size or np.linalg.matrix_rank(exact, eps) < p
        assert np.linalg.norm(gram @ r - r) < size
        assert np.linalg.norm(q @ r - exact) < 10 * eps * np.linalg.norm(exact)
        both = partial(sketch.split, factors), partial(householder.split, A)
        ours, theirs = (split(b[:, None]) for split in both)
        s, t = (np.linalg.svd(np.asarray(x[0], float), compute_uv=False) for x in (ours, theirs))
        np.testing.assert_allclose(s, t, atol=10 * eps)
        # The range of A is known up to kappa eps (Wedin 1972), by any method.
        size = 10 * eps * kappa * np.linalg.norm(b) ** 2
        np.testing.assert_allclose((ours[2] ** 2).sum(), (theirs[2] ** 2).sum(), atol=size)
        np.testing.assert_allclose((ours[1] ** 2).sum(), (theirs[1] ** 2).sum(), atol=size)
    else:
        assert kappa * eps > 1e-2


@pytest.mark.single_first
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kappa", [1e1, 1e5, 1e14])
def test_factors_from_a_triangle(kappa, scaled, precision):
    """As good as those of Householder's method, that R is from, for columns of any size and without some."""
    dtype = np.float64 if precision else np.float32
    eps = np.finfo(dtype).eps
    rng = np.random.default_rng(3)
    m, p = 1100, 20
    A, b = problem(rng, m, p, min(kappa, 0.01 / eps), dtype)
    if scaled:
        A = A * (2.0 ** rng.integers(-20, 20, p)).astype(dtype)
    r = np.eye(p, dtype=dtype)
    r[:-2, :-2] = householder.triangle(A[:, :-2])
    e = np.diag(np.arange(p) < p - 2).astype(dtype)

    @jax.jit
    def factors(A, e, r, b):
        # One matrix, and a batch
        found = cholesky.orthonormal_basis(A, e, r), cholesky.orthonormal_basis(A[None], e[None], r[None])
        found = found[0], jax.tree.map(lambda x: x[0], found[1])
        return [(x.times(jnp.eye(p, dtype=dtype)), c, x.adjoint_times(b[:, None])) for x, c in found]

    for found in factors(A, e, r, b):
        check_factors(A @ e, r, b, min(kappa, 0.01 / eps), *found)


def check_factors(A, r, b, kappa, q, c, q_b):
    p, eps = r.shape[-1], np.finfo(r.dtype).eps
    kept = A.any(0)
    assert np.array_equal(kept, np.asarray(q).any(0))
    q = np.asarray(q, float)
    np.testing.assert_allclose(q_b, q.T @ b[:, None], rtol=0, atol=p * eps * np.linalg.norm(b))
    assert np.linalg.norm(q.T @ q - np.diag(kept)) < 10 * p * eps
    error = q @ (np.asarray(c, float) @ np.asarray(r, float)) - A
    assert (np.linalg.norm(error, axis=0) <= p * eps * np.linalg.norm(A, axis=0)).all()
    np.testing.assert_allclose(np.triu(c), c, rtol=0, atol=0)
    np.testing.assert_allclose(abs(np.asarray(c)), np.eye(p), atol=p * eps * kappa)


def kahan(p):
    """Pivoted already, and R^-1 grows like 2^p all the same."""
    s, c = 0.9, -(0.19**0.5)
    return np.diag(s ** np.arange(p)) @ (np.eye(p) + c * np.triu(np.ones((p, p)), 1))


def test_corrected_product(x64):
    """R with pivoting whose inverse is large: what a product loses is made up for."""
    rng = np.random.default_rng(4)
    p, eps = 40, np.finfo(float).eps
    q, r = problems.orthonormal(rng, 1100, p, np.float64), kahan(p)
    A = q @ r
    growth = float(cholesky.product_growth(r, np.linalg.inv(r)))
    assert growth > 10 * cholesky.GROWTH
    z = np.asarray(jax.jit(cholesky._graded_basis)(A, np.eye(p), r))
    error = np.linalg.norm(z @ r - A, axis=0) / np.linalg.norm(A, axis=0)
    assert (error <= p * eps).all()
    product = np.linalg.norm(A @ np.linalg.inv(r) @ r - A, axis=0) / np.linalg.norm(A, axis=0)
    assert (product > 3 * error.max()).any()


@pytest.mark.single_first
@pytest.mark.parametrize("power", [*slow(-900), 1005])
def test_ends_of_the_range(power, precision):
    """What scales T is not lost in a small matrix: values through the sketch, gradients of what truncates."""
    dtype, power = (np.float64, power) if precision else (np.float32, power // 9)
    rng = np.random.default_rng(2)
    A, b = rng.standard_normal((2400, 12)).astype(dtype), rng.standard_normal(2400).astype(dtype)
    hard = A * 10.0 ** -np.arange(12).astype(dtype) if precision else A * 2.0 ** -np.arange(12).astype(dtype)
    A[:, 7] = A[:, 2]
    scale = dtype(2.0**power)

    @partial(jax.jit, static_argnames="driver")
    def both(A, b, scale, driver):
        def fun(b):
            x = lstsq(A * scale, b, driver=driver).solution * scale
            return (x * np.arange(12)).sum(), x

        (_, x), gradient = jax.value_and_grad(fun, has_aux=True)(b)
        return x, gradient

    for a, driver in ((hard, "gels"), (A, "gelsy"), (A, "gelsd")):
        a = a.astype(dtype)
        for here, expected in zip(both(a, b, scale, driver), both(a, b, dtype(1), driver), strict=True):
            largest = abs(np.asarray(expected)).max()
            np.testing.assert_allclose(here, expected, rtol=0, atol=200 * np.finfo(dtype).eps * largest)


@pytest.mark.single_first
def test_sketch_drops_nothing_that_counts(precision):
    """Columns that depend on others to 30 eps: gels has an answer, and rcond = eps the full rank."""
    eps = np.finfo(np.float64 if precision else np.float32).eps
    rng = np.random.default_rng(9)
    A = rng.standard_normal((2400, 20))
    A /= np.linalg.norm(A, axis=0)
    A[:, 7] = A[:, 3] + 30 * eps * A[:, 7]
    A = A.astype(np.result_type(eps))
    b = A @ np.ones(20, A.dtype)
    assert sketch.worthwhile(A.shape)
    assert np.linalg.norm(lstsq(A, b, driver="gels").solution - 1) < 0.5
    assert lstsq(A, b, -1, driver="gelsd").rank == 20
    for driver in ("gelsy", "gelsd"):
        assert lstsq(A, b, driver=driver).rank == 19


@pytest.mark.parametrize("spoil", ["zero", "nan", "one row", "repeated"])
def test_sketch_refuses_or_is_right(spoil, x64):
    """Matrices that a sketch may lose: the answer is right all the same."""
    rng = np.random.default_rng(3)
    A, b = rng.standard_normal((3000, 12)), rng.standard_normal(3000)
    if spoil == "zero":
        A[:, 3] = 0
    elif spoil == "nan":
        A[5, 3] = np.nan
    elif spoil == "one row":
        A[:, 3] = 0
        A[17, 3] = 1e8
    else:
        A[:, 3] = A[:, 4]
    result = lstsq(A, b)
    if spoil == "nan":
        assert np.isnan(result.solution).all()
        assert result.rank == 0
        return
    x, _, rank, _ = scipy.linalg.lstsq(A, b, lapack_driver="gelsy", cond=3000 * np.finfo(float).eps)
    assert result.rank == rank
    np.testing.assert_allclose(result.solution, x, atol=1e-11)


@pytest.mark.parametrize("dtype", [*slow("float32"), "complex128"])
def test_whole_numbers(dtype, x64):
    """Exactly orthogonal, equal and dependent columns, where what is left of a column may cancel or not."""
    rng = np.random.default_rng(5)
    A = rng.integers(-2, 3, (3000, 4, 3)).astype(dtype)
    if dtype == "complex128":
        A += 1j * rng.integers(-2, 3, A.shape)
    A[0, :3], A[0, 3] = np.eye(3), 0
    B = rng.integers(-2, 3, (3000, 4, 1)).astype(dtype)
    exact = A.astype(np.result_type(dtype, np.float64))
    s = np.linalg.svd(exact, compute_uv=False)
    eps = np.finfo(dtype).eps
    for driver in ("gelsy", "gelsd"):
        result = lstsq(A, B, 1e-4, driver=driver)
        assert (result.rank == (s > 1e-4 * s[:, :1]).sum(-1)).all()
        x = np.linalg.pinv(exact, rcond=1e-4) @ B
        assert (np.linalg.norm(result.solution - x, axis=1) <= 1e4 * eps).all()
    assert abs(result.singular_values - s).max() <= 40 * eps * s.max()


@pytest.mark.parametrize("n", [3, 8, 12, *slow(256)])
def test_columns_at_the_ends_of_the_range(n, x64):
    """Everything is kept where rcond is 0, and no product of two sizes may overflow."""
    rng = np.random.default_rng(6)
    A = rng.standard_normal((2 * n + 8, n)) * np.logspace(-150, 150, n)
    b = rng.standard_normal(2 * n + 8)
    exact = scipy.linalg.lstsq(A, b, cond=0, lapack_driver="gelsy")[0]
    result = lstsq(A, b, 0.0)
    assert result.rank == n
    np.testing.assert_allclose(result.solution, exact, rtol=1e-9)
    tiny = np.diag(np.r_[np.ones(n - 1), 1e-20]).astype(np.float32)
    np.testing.assert_allclose(
        lstsq(tiny, np.ones(n, np.float32), 0.0).solution, 1 / np.diag(tiny), rtol=1e-6
    )


@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_vmap_over_rcond_reduces_once(driver, x64):
    A, B = jnp.ones((50, 20)).at[jnp.arange(20), jnp.arange(20)].add(3), jnp.ones((50, 1))
    rconds = jnp.array([1e-8, 0.05, 0.2])
    fun = jax.jit(jax.vmap(lambda r: lstsq(A, B, r, driver=driver)))
    text = fun.lower(rconds).compile().as_text()
    assert not any("f64[3,50," in line for line in text.splitlines() if "custom-call" in line)
    result = fun(rconds)
    for i, rcond in enumerate(rconds):
        one = lstsq(A, B, rcond, driver=driver)
        assert int(result.rank[i]) == int(one.rank)
        np.testing.assert_allclose(result.solution[i], one.solution, atol=1e-13)


@pytest.mark.single_first
@pytest.mark.parametrize("shape", [(5, 2), (40, 2)], ids=str)
def test_columns_of_any_scale(shape, precision):
    """What is left of a column may underflow when squared: the same answer from values, jvp and factors."""
    small = 1e-170 if precision else 1e-25
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal(shape), rng.standard_normal(shape[0]).astype(dtype)
    expected = np.linalg.lstsq(A, b.astype(float), rcond=None)[0]
    for scale in (np.array([1, small]), np.array([small, 1])):
        scaled = (A * scale).astype(dtype)
        solutions = (
            lstsq(scaled, b, driver="gels").solution,
            jax.jvp(lambda b, A=scaled: lstsq(A, b, driver="gels").solution, (b,), (b,))[0],
            factorize(scaled, driver="gels").solve(b),
        )
        for x in solutions:
            np.testing.assert_allclose(np.asarray(x, float) * scale, expected, rtol=50 * np.finfo(dtype).eps)


def test_small_and_nearly_dependent(precision):
    """A 4 x 2 matrix of small scale, whose second column is 1e-5 (1e-10) off the first."""
    dtype, scale, off = (np.float64, 1e-145, 1e-10) if precision else (np.float32, 3e-15, 1e-5)
    rng = np.random.default_rng(1)
    column, noise = np.ones(4), rng.standard_normal(4)
    A, b = np.stack([column, column + off * noise], 1) * scale, rng.standard_normal(4).astype(dtype)
    A = A.astype(dtype)
    exact = A.astype(float) / scale
    x = scipy.linalg.lstsq(exact, b.astype(float), cond=1e-15)[0] / scale
    s = np.linalg.svd(exact, compute_uv=False) * scale
    eps = np.finfo(dtype).eps
    for driver in ("gels", "gelsd"):
        result = lstsq(A, b, 0.0, driver=driver)
        np.testing.assert_allclose(np.asarray(result.solution, float), x, rtol=20 * eps / off)
    np.testing.assert_allclose(np.asarray(result.singular_values, float), s, rtol=20 * eps / off)


def test_rejected_gram_matrices_leave_hessians_finite(x64):
    """The branch that is not taken computes with it all the same, and 0 * inf is NaN."""
    rng = np.random.default_rng(2)
    A, b = rng.standard_normal((40, 2)), rng.standard_normal(40)
    A[:, 1] *= 1e-150
    direction = rng.standard_normal((40, 2))
    hvp = jax.jit(
        lambda A: jax.jvp(jax.grad(lambda A: (lstsq(A, b).solution ** 2).sum()), (A,), (direction,))[1]
    )(A)
    assert np.isfinite(hvp).all()


@pytest.mark.parametrize("shape", [(12, 64, 12), (40, 8, 6)], ids=str)
def test_singular_values_of_neighbours(shape, x64):
    """The second pass and the sweeps that an element needs leave the singular values of the others alone."""
    rng = np.random.default_rng(3)
    A = np.stack([problems.orthonormal(rng, *shape[1:], np.float64) for _ in range(shape[0])])
    A[3] = np.vander(np.linspace(0, 1, shape[1]), shape[2])
    if shape[1] == 64:
        A[3] = rng.standard_normal(shape[1:])
        A[3, :, 1] = A[3, :, 0] + 0.003 * A[3, :, 1]
    fun = jax.jit(lambda A: lstsq(A, A[..., :1], driver="gelsd").singular_values)
    clean = np.asarray(fun(A))
    A[3, 0, 0] = np.nan
    dirty = np.asarray(fun(A))
    others = np.arange(shape[0]) != 3
    np.testing.assert_array_equal(clean[others], dirty[others])
    assert np.isnan(dirty[3]).all()


SQUARE = 128


def square(kind, rng, n=SQUARE):
    """A square matrix that elimination with partial pivoting may find hard, columns of norm about one."""
    A = rng.standard_normal((n, n)) / np.sqrt(n)
    if kind == "growth":  # of 2^(n-1) (Wilkinson 1961)
        A = np.eye(n) - np.tril(np.ones((n, n)), -1)
        A[:, -1] = 1
    elif kind == "graded growth":
        A = np.eye(n) - np.tril(np.ones((n, n)), -1) + 1e-3 * A
        A[:, -1] = 1
    elif kind == "rows":
        A *= np.logspace(0, -12, n)[:, None]
    elif kind == "columns":
        A *= np.logspace(0, -12, n)
    elif kind == "repeated":
        A[:, 3] = A[:, 4]
    elif kind == "sum":
        A[:, 3] = 128 * (A[:, 4] - A[:, 5])
    elif kind == "zero column":
        A[:, 3] = 0
    elif kind == "zero":
        A *= 0
    elif kind == "triangular":  # ill conditioned, though no pivot is small (Kahan 1966)
        A = np.eye(n) - np.triu(np.ones((n, n)), 1)
    elif kind == "huge":
        A *= 1e30
    elif kind == "tiny":
        A *= 1e-30
    elif isinstance(kind, float):
        A = problems.with_spectrum(rng, n, n, np.logspace(0, -np.log10(kind), n))
    return A


def backward_error(A, x, b):
    """In units of eps: the relative change of each column of A, and of b, that makes the residual zero."""
    exact, rhs, x = A.astype(float), b.astype(float), x.astype(float)
    norms = np.linalg.norm(exact, axis=0)
    size = norms @ abs(x) + np.linalg.norm(rhs)
    return np.linalg.norm(rhs - exact @ x) / size / np.finfo(A.dtype).eps


@pytest.fixture(scope="module")
def by_lu():
    """The attempt for one square matrix, compiled once for each driver and precision."""
    fun = jax.jit(attempt_at, static_argnums=(0, 1))
    return lambda driver, A, b: fun(driver, False, jnp.asarray(A), jnp.asarray(b)[:, None])


EASY = ("gaussian", "rows", "columns", 1e1, 1e2)
HARD = ("growth", "graded growth", "repeated", "sum", "zero column", "zero", "triangular", "huge", "tiny")


@pytest.mark.parametrize(
    "kind", [*EASY, *HARD, 1e3, 1e4, 2e4, 4e4, 6e4, 1e5, 1e6, 1e7, 1e8, 1e10, 1e12, 1e14, 1e16], ids=str
)
def test_square_by_elimination(kind, precision, by_lu):
    """What is accepted is as good as by Householder's method, with the same rank and NaN decisions."""
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(4)
    A, b = square(kind, rng).astype(dtype), rng.standard_normal(SQUARE).astype(dtype)
    result = by_lu("gelsy", A, b)
    s = np.linalg.svd(A.astype(float), compute_uv=False)
    rank = (s > SQUARE * np.finfo(dtype).eps * s[0]).sum()
    certified = result.solved & (result.condition * SQUARE * np.finfo(dtype).eps < 0.9)
    if result.solved:
        assert backward_error(A, np.asarray(result.solution)[:, 0], b) <= 2
    if certified:
        assert rank == SQUARE
        assert result.condition >= s[0] / s[-1]
    gels = by_lu("gels", A, b)
    if gels.solved:
        _, r = scipy.linalg.qr(A.astype(float))
        scaled = np.linalg.norm(r, axis=0)[:, None] * abs(scipy.linalg.solve_triangular(r, np.eye(SQUARE)))
        assert scaled.sum(0).max() * np.finfo(dtype).eps < 0.25
        assert backward_error(A, np.asarray(gels.solution)[:, 0], b) <= 2
    sharp = isinstance(kind, float) and kind * SQUARE * np.finfo(dtype).eps < 0.35 and not precision
    if kind in ("gaussian", 1e1, 1e2) or sharp:
        assert certified
        assert gels.solved
    if kind in ("growth", "repeated", "sum", "zero column", "zero", 1e16):
        assert not certified
        assert not gels.solved
    if kind == "columns":
        assert gels.solved


@pytest.mark.parametrize("driver", ["gels", "gelsy", "gelsd"])
@pytest.mark.parametrize("kind", ["gaussian", "growth", "repeated", "nan"])
def test_square_answers(driver, kind, x64):
    """Whichever way is taken, and with a bad column of b; singular values are those of A."""
    rng = np.random.default_rng(5)
    A, B = square(kind, rng), rng.standard_normal((SQUARE, 3))
    if kind == "nan":
        A[3, 4] = np.nan
    B[7, 1] = np.inf
    result = lstsq(A, B, driver=driver)
    assert np.isnan(result.solution[:, 1]).all()
    if kind == "nan" or (kind == "repeated" and driver == "gels"):
        assert np.isnan(result.solution).all()
        assert driver == "gels" or kind == "repeated" or result.rank == 0
        return
    x, _, rank, s = np.linalg.lstsq(A, B[:, ::2], rcond=SQUARE * np.finfo(float).eps)
    np.testing.assert_allclose(result.solution[:, ::2], x, atol=1e-10 * abs(x).max())
    if driver != "gels":
        assert result.rank == rank
    if driver == "gelsd":
        np.testing.assert_allclose(result.singular_values, s, atol=1e-13 * s[0])
