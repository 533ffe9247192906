"""Pivoted QR: an exact factorisation, and a diagonal that shows the rank, at few and at many columns."""

import jax
import numpy as np
import problems
import pytest
import scipy.linalg
from marks import slow, slow_cases

from jlstsq import lstsq
from jlstsq._decompose.pivoted_qr import pivoted_at_once, pivoted_qr

RANK = 15


def matrix(rng, p, kind):
    if kind == "graded":
        return problems.with_spectrum(rng, p, p, np.logspace(0, -6, p))
    if kind == "complex":
        return matrix(rng, p, "deficient") + 1j * matrix(rng, p, "deficient")
    a = rng.standard_normal((p, RANK)) @ rng.standard_normal((RANK, p))
    if kind == "repeated":
        a = rng.standard_normal((p, p))
        a[:, RANK:] = a[:, [3] * (p - RANK)]
    if kind == "scaled":
        a = a * np.logspace(8, -8, p)
    return a * 0 if kind == "zero" else a


@pytest.mark.parametrize("kind", ["deficient", "graded", "repeated", "scaled", "complex", "zero"])
@pytest.mark.parametrize(
    ("p", "factor"),
    [(20, pivoted_qr), *slow_cases((50, pivoted_qr)), (50, pivoted_at_once)],
    ids=["one panel", "two panels", "at once"],
)
def test_pivoted_qr(p, factor, kind, precision):
    rng = np.random.default_rng(4)
    a = np.stack([matrix(rng, p, kind) for _ in range(3)])
    real, imaginary = (np.float64, np.complex128) if precision else (np.float32, np.complex64)
    a = a.astype(imaginary if kind == "complex" else real)
    eps = np.finfo(a.dtype).eps
    factor = jax.jit(lambda a, of=factor: of(a, np.broadcast_to(np.eye(p, dtype=a.dtype), a.shape)))
    r, uh, perm = (np.asarray(x) for x in factor(a))
    u = uh.conj().swapaxes(-1, -2)
    cpu = jax.default_backend() == "cpu"
    # Beyond the rank pivots are chosen by rounding errors. cuBLAS's and cuSOLVER's complex pivots differ.
    if kind == "deficient" or (kind == "complex" and cpu):
        alone = factor(a[1])[2]
        assert (perm[1] == alone)[:RANK].all()
    for i in range(3):
        assert (np.sort(perm[i]) == np.arange(p)).all()
        norms = np.linalg.norm(a[i], axis=0)
        assert (np.linalg.norm(a[i][:, perm[i]] - u[i] @ r[i], axis=0) <= 20 * p * eps * norms[perm[i]]).all()
        # cuBLAS loses orthogonality in columns of which nothing is left: see `_values._squared_residuals`.
        orthonormal = p if cpu or kind != "repeated" else RANK
        ui = u[i][:, :orthonormal]
        assert np.linalg.norm(ui.conj().T @ ui - np.eye(orthonormal)) < 20 * p * eps
        assert (np.tril(r[i], -1) == 0).all()
        diagonal, s = abs(np.diag(r[i])), np.linalg.svd(a[i].astype(np.complex128), compute_uv=False)
        if kind == "scaled":  # pivots follow the columns' size, singular values do not
            continue
        floor = 100 * p * eps * s[0]
        assert (diagonal <= 10 * s + floor).all()
        assert (s <= 30 * diagonal + floor).all()


@pytest.mark.cpu
@pytest.mark.parametrize("p", [30, *slow(150)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex128])
def test_pivots_of_a_slope(p, kind, x64):
    """To nearly rounding errors, in several stages, the pivots are LAPACK's; what is below `stop` is left."""
    rng = np.random.default_rng(3)
    depth = 5 if kind is np.float32 else 13
    spectra = [np.logspace(0, -depth, p), np.logspace(-2, -2 - depth / 2, p)]
    r = np.stack([np.linalg.qr(problems.with_spectrum(rng, p, p, s))[1] for s in spectra])
    if kind is np.complex128:
        r = np.linalg.qr(r + 1j * np.roll(r, 1, axis=-1))[1]
    r, stop = r.astype(kind), np.array([10.0 ** (1 - depth), 1e-9])
    c = rng.standard_normal((2, p, 1)).astype(kind)
    rp, uh_c, perm = (np.asarray(x) for x in jax.jit(pivoted_qr)(r, c, stop.astype(r.real.dtype)))
    for i in range(2):
        theirs = scipy.linalg.qr(r[i].astype(np.complex128), mode="r", pivoting=True)
        kept = abs(np.diag(theirs[0])) > 2 * stop[i]
        rank = kept.sum()
        assert rank > p / 3
        assert (perm[i] == theirs[1])[:rank].all()
        assert (np.linalg.norm(rp[i][rank:, rank:], axis=0) <= 2.01 * stop[i]).all()
        # Rp^H [Rp, U^H c] = P^T R^H [R P, c]
        expected = r[i][:, perm[i]].conj().T @ np.concatenate([r[i][:, perm[i]], c[i]], axis=1)
        found = rp[i].conj().T @ np.concatenate([rp[i], uh_c[i]], axis=1)
        assert abs(found - expected).max() < 10 * p * np.finfo(kind).eps


@pytest.mark.parametrize("gap", [10.0, 100.0, 1e6])
def test_rank_at_a_gap(gap, x64):
    """40 singular values of 1 and 24 smaller ones, as columns in any order: what xGELSY finds."""
    rng = np.random.default_rng(8)
    s = np.stack([rng.permutation(np.r_[np.ones(40), np.full(24, 1 / gap)]) for _ in range(40)])
    A = s[:, None, :] * np.eye(64)
    assert (lstsq(A, np.ones((40, 64)), gap**-0.5).rank == 40).all()
    q = problems.orthonormal(rng, 64, 64, np.float64)
    assert (lstsq(q @ A[:10], np.ones((10, 64)), gap**-0.5).rank == 40).all()


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("rcond", [100, 300, 1000])
def test_rank_in_a_slope(rcond, x64):
    """A spectrum cut just above rounding errors: values, derivative and xGELSY agree (but on ties)."""
    rng = np.random.default_rng(7)
    s, rcond = np.logspace(0, -17, 100), rcond * np.finfo(float).eps
    A = np.stack([problems.with_spectrum(rng, 100, 100, s) for _ in range(20)])
    b = rng.standard_normal((20, 100))
    result = lstsq(A, b, rcond)
    theirs = [scipy.linalg.lstsq(*ab, cond=rcond, lapack_driver="gelsy")[2] for ab in zip(A, b, strict=True)]
    assert (result.rank != np.array(theirs)).sum() <= 1

    def solution(A):
        result = lstsq(A, b, rcond)
        return result.solution.sum(), result.rank

    (_, rank), _ = jax.jit(jax.value_and_grad(solution, has_aux=True))(A)
    assert (rank != result.rank).sum() <= 1


@pytest.mark.parametrize("shape", [(90, 40), *slow((40, 90))], ids=["tall", "wide"])
def test_gelsy_of_many_columns(shape, x64):
    """Truncated: the solution is gelsd's, the gradient that of differences within matrices of this rank."""
    rng = np.random.default_rng(5)
    left, right = rng.standard_normal((shape[0], RANK)), rng.standard_normal((RANK, shape[1]))
    b, w, move = rng.standard_normal(shape[0]), rng.standard_normal(shape[1]), rng.standard_normal(left.shape)

    @jax.jit
    def f(A):
        result = lstsq(A, b)
        return result.solution @ w, result

    (value, result), gradient = jax.value_and_grad(f, has_aux=True)(left @ right)
    assert result.rank == RANK
    exact = lstsq(left @ right, b, driver="gelsd").solution
    np.testing.assert_allclose(result.solution, exact, rtol=1e-10, atol=1e-12)
    h = 1e-6
    difference = (f((left + h * move) @ right)[0] - f((left - h * move) @ right)[0]) / (2 * h)
    np.testing.assert_allclose(
        (gradient * (move @ right)).sum(), difference, rtol=1e-6, atol=1e-7 * abs(value)
    )


def slope(rng, m, n):
    """Singular values that fall evenly to 1e-6, so that pivots decide what a cut among them keeps."""
    return problems.with_spectrum(rng, m, n, np.logspace(0, -6, n))


@pytest.mark.parametrize("n", [12, 40])
def test_neighbours_do_not_choose_pivots(n, x64):
    """Where dropped columns have much left: bit for bit the same beside whatever is in the batch."""
    rng = np.random.default_rng(0)
    A, b = slope(rng, n + 10, n), rng.standard_normal((2, n + 10))
    N = rng.standard_normal((n + 10, 3)) @ rng.standard_normal((3, n))

    @jax.jit
    def both(A, rcond):
        def solution(A):
            result = lstsq(A, b, rcond)
            return result.solution, result.rank

        return solution(A), jax.jvp(solution, (A,), (A,))

    for rcond in (1e-3, 1e-4):
        alone = both(np.stack([A, A]), np.full(2, rcond))
        for neighbour, cut in [(N, np.nan), (N, 1.0), (A, 0.3), (N, rcond), (slope(rng, n + 10, n), rcond)]:
            beside = both(np.stack([A, neighbour]), np.array([rcond, cut]))
            for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(beside), strict=True):
                assert np.array_equal(x[0], y[0])


def test_one_decision_for_values_and_derivatives(x64):
    """Under vmap over rcond alone as well, with the cut anywhere on a slope."""
    rng = np.random.default_rng(1)
    A, b = slope(rng, 50, 40), rng.standard_normal(50)

    def solution(A, rcond):
        result = lstsq(A, b, rcond)
        return result.solution, result.rank

    def derivative(rcond):
        return jax.jvp(lambda A: solution(A, rcond), (A,), (A,))[0]

    cuts = np.logspace(-0.5, -5, 16)
    plain = jax.jit(jax.vmap(lambda rcond: solution(A, rcond)))(cuts)
    primal = jax.jit(jax.vmap(derivative))(cuts)
    assert (plain[1] == primal[1]).all()
    if jax.default_backend() == "cpu":  # the same library calls, nearly
        np.testing.assert_allclose(plain[0], primal[0], rtol=1e-9, atol=1e-9)
    # Rounding errors are as large as the largest entries, not as each of them.
    error = np.linalg.norm(plain[0] - primal[0], axis=-1)
    assert (error <= 1e-9 * np.linalg.norm(plain[0], axis=-1)).all()


@pytest.mark.parametrize("shape", [(12, 9), (60, 40)], ids=str)
def test_truncates_as_xgelsy(shape, x64):
    """Dropped columns that are small, but not nothing: which ones are kept is seen in the solution."""
    rng = np.random.default_rng(2)
    A = rng.standard_normal((shape[0], 5)) @ rng.standard_normal((5, shape[1]))
    A, b = A + 1e-4 * rng.standard_normal(shape), rng.standard_normal(shape[0])
    x, _, rank, _ = scipy.linalg.lstsq(A, b, cond=1e-2, lapack_driver="gelsy")
    result = lstsq(A, b, 1e-2)
    assert result.rank == rank == 5
    np.testing.assert_allclose(result.solution, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (40, np.float32),
        *slow_cases(*((n, np.complex64) for n in (8, 20, 40)), *((n, np.float32) for n in (8, 20))),
    ],
    ids=str,
)  # fmt: skip
def test_repeated_columns(n, dtype):
    """What is left of a column is again and again a rounding error of what was left, and underflows."""
    rng = np.random.default_rng(0)
    data = problems.right_hand_side(rng, 3 * (n + 5), n + 1, dtype).reshape(3, n + 5, n + 1).astype(dtype)
    A, b = data[..., :n], data[..., n]
    A[..., 2:] = A[..., [1] * (n - 2)]
    exact = [np.linalg.lstsq(a.astype(complex), c, rcond=1e-5)[0] for a, c in zip(A, b, strict=True)]
    left = [np.linalg.norm(c - a @ x) ** 2 for a, c, x in zip(A, b, exact, strict=True)]
    for driver in ("gelsy", "gelsd"):

        @jax.jit
        def solve(A, driver=driver):
            result = lstsq(A, b, driver=driver)
            return abs(result.solution).sum(), result

        (_, result), gradient = jax.value_and_grad(solve, has_aux=True)(A)
        assert (result.rank == 2).all()
        np.testing.assert_allclose(result.solution, exact, atol=1e-6)
        np.testing.assert_allclose(result.residuals[:, 0], left, rtol=1e-5)
        np.testing.assert_allclose(solve(A)[1].residuals[:, 0], left, rtol=1e-5)
        assert np.isfinite(gradient).all()
