"""The sizes people use, in float32, against float64 NumPy."""

import math
from functools import partial

import jax
import numpy as np
import problems
import pytest
import scipy.linalg
from marks import slow, slow_cases

from jlstsq import lstsq

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
# A compiler's optimisations can go wrong at these sizes, and have.
pytestmark = pytest.mark.optimised


@pytest.mark.parametrize(
    ("driver", "shape"),
    [
        pytest.param(driver, shape, marks=() if driver == default else pytest.mark.slow)
        for shape, default in [
            ((20000, 8, 3), "gelsd"), ((600000, 2), "gelsy"), ((3, 9000, 4, 2), ""), ((12000, 2, 4), ""),
        ]
        for driver in DRIVERS
    ],
    ids=str,
)  # fmt: skip
def test_float32(driver, shape):
    # The default, eps * m = 0.07 at 600 000 rows, may truncate.
    rcond = 1e-6 if driver != "gels" and shape == (600000, 2) else None
    rng = np.random.default_rng(0)
    A = rng.standard_normal(shape).astype(np.float32)
    B = rng.standard_normal(shape[:-1]).astype(np.float32)
    x = np.asarray(lstsq(A, B, rcond, driver=driver).solution, np.float64)
    exact = A.astype(np.float64)
    pinv = np.linalg.pinv(exact)
    expected = (pinv @ B[..., None].astype(np.float64))[..., 0]
    kappa = np.linalg.norm(exact, 2, axis=(-2, -1)) * np.linalg.norm(pinv, 2, axis=(-2, -1))
    residual = np.linalg.norm(B - (exact @ expected[..., None])[..., 0], axis=-1)
    size = np.linalg.norm(expected, axis=-1)
    inverse = np.linalg.norm(pinv, 2, axis=(-2, -1))
    # Wedin's bound, eps kappa (|x| + |A^+| |r|), times a small constant (2.5 measured)
    bound = 8 * np.finfo(np.float32).eps * kappa * (size + inverse * residual)
    bound = np.where(kappa < 1e5, bound, np.inf)
    assert (np.linalg.norm(x - expected, axis=-1) <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2, 3])
def test_long_sums(columns):
    """A million positive terms in single precision: a plain running sum is wrong by 1e-4."""
    rng = np.random.default_rng(4)
    A = (1 + 0.3 * rng.random((1_000_000, columns))).astype(np.float32)
    b = (A @ np.arange(1, columns + 1) + 0.1 * rng.standard_normal(len(A))).astype(np.float32)
    exact = A.astype(float)
    expected = np.linalg.lstsq(exact, b.astype(float), rcond=None)[0]
    result = lstsq(A, b, 1e-6, driver="gelsd")
    np.testing.assert_allclose(result.solution, expected, rtol=1e-5)
    np.testing.assert_allclose(result.singular_values, np.linalg.svd(exact, compute_uv=False), rtol=1e-5)
    # The gradient of the first unknown in b: the first row of the pseudoinverse.
    gradient = jax.grad(lambda b: lstsq(A, b, 1e-6).solution[0])(b)
    row = np.linalg.pinv(exact)[0]
    assert np.linalg.norm(gradient - row) <= 1e-4 * np.linalg.norm(row)


@pytest.mark.parametrize("driver", ["gelsd", *slow("gels", "gelsy", "gelss")])
def test_blocks(driver, x64):
    """A batch that is solved block by block, hard elements in the last block, which overlaps another."""
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((2, 501, 24, 10)), rng.standard_normal((2, 501, 24))
    A[1, 500, :, 3] = A[1, 500, :, 4]
    A[1, 499, 2, 2] = np.nan
    result = lstsq(A, B, driver=driver)
    expected = np.linalg.pinv(A[:, :499], rcond=1e-12) @ B[:, :499, :, None]
    np.testing.assert_allclose(result.solution[:, :499], expected[..., 0], rtol=1e-9, atol=1e-9)
    assert np.isnan(result.solution[1, 499]).all()
    assert np.isfinite(result.solution[0]).all()
    # The same whatever the block is: a few of the elements alone.
    few = lstsq(A[1, 497:], B[1, 497:], driver=driver)
    for ours, alone in zip(result, few, strict=True):
        if ours.size:
            np.testing.assert_allclose(ours[1, 497:], alone, rtol=1e-12, atol=1e-12)
    if driver != "gels":
        assert result.rank[1, 500] == 9


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("driver", DRIVERS[:3])  # gelss is gelsd on a CPU
@pytest.mark.parametrize("shape", [(10000, 50), (30000, 20), (1000, 64, 32)], ids=str)
def test_memory(shape, driver, x64):
    """Temporary memory in sizes of A: of a value and of gradients, every branch counted."""
    A, b = (jax.ShapeDtypeStruct(s, np.float64) for s in (shape, shape[:-1]))

    def size(fun):
        memory = jax.jit(fun).lower(A, b).compile().memory_analysis()
        return memory.temp_size_in_bytes / (math.prod(shape) * 8)

    def loss(A, b, every):
        result = lstsq(A, b, driver=driver)
        outputs = (result.solution, result.residuals, result.singular_values)
        return sum((x**2).sum() for x in outputs[: 3 if every else 1])

    if len(shape) == 2:
        assert size(partial(lstsq, driver=driver)) < (2.5 if driver in ("gels", "gelsy") else 3.5)
    # Z = A R^-1 lies where the gradient will; singular values add what becomes of U.
    for every in (False, True):
        gradient = jax.value_and_grad(partial(loss, every=every), (0, 1))
        assert size(gradient) < (2.5 if driver == "gelsd" and every else 1.5)


@pytest.mark.parametrize("driver", ["gelsy", *slow("gels", "gelsd", "gelss")])
def test_tall_float32(driver):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((150000, 10)).astype(np.float32)
    B = (A @ np.arange(1, 11) + 0.01 * rng.standard_normal(150000)).astype(np.float32)
    np.testing.assert_allclose(lstsq(A, B, driver=driver).solution, np.arange(1, 11), atol=2e-4)


@pytest.mark.single_first
def test_gels_refuses_dependent_columns(precision):
    dtype = np.float64 if precision else np.float32
    rng = np.random.default_rng(2)
    for dependent in (
        lambda a: a[..., 0] + a[..., 1],
        lambda a: a[..., 0],
        lambda a: 128 * (a[..., 0] - a[..., 1]),
    ):
        A = rng.standard_normal((200, 6, 3)).astype(dtype)
        A[..., 2] = dependent(A)
        B = rng.standard_normal((200, 6)).astype(dtype)
        x = lstsq(A, B, driver="gels").solution
        assert np.isnan(x).all(-1).mean() >= 0.99
    zero = lstsq(np.zeros((4, 3), dtype), np.ones(4, dtype), driver="gels")
    assert np.isnan(zero.solution).all()


def test_gels_solves_vandermonde_in_float32():
    t = np.linspace(0, 1, 40)
    A = np.vander(t, 9, increasing=True).astype(np.float32)
    y = (A.astype(np.float64) @ np.ones(9)).astype(np.float32)
    result = lstsq(A, y, driver="gels")
    assert np.isfinite(result.solution).all()
    np.testing.assert_allclose(A @ result.solution, y, rtol=1e-4)


@pytest.mark.parametrize(
    ("driver", "shape"),
    [
        ("gelsy", (12, 6)),
        *slow_cases(("gelsd", (6, 12)), ("gelsy", (6, 12)), ("gelsd", (12, 6))),
    ],
    ids=str,
)
def test_rank_agrees_with_lapack(driver, shape, x64):
    """1000 matrices of prescribed spectra with a cut away from every singular value."""
    rng = np.random.default_rng(3)
    count, p = 1000, 6
    s = np.sort(10.0 ** rng.uniform(-12, 0, (count, p)))[:, ::-1]
    s[:, 0] = 1
    rcond = np.empty(count)
    for i in range(count):
        # the widest gap of the spectrum: a decision no driver may miss
        gaps = np.log10(s[i, :-1] / s[i, 1:])
        j = int(gaps.argmax())
        rcond[i] = np.sqrt(s[i, j] * s[i, j + 1])
        if gaps[j] < 3:
            s[i, j + 1 :] *= 1e-3
            rcond[i] = np.sqrt(s[i, j] * s[i, j + 1])
    A = np.stack([problems.with_spectrum(rng, *shape, si) for si in s])
    B = rng.standard_normal((count, shape[0]))
    result = lstsq(A, B, rcond, driver=driver)
    for i in range(count):
        x, _, rank, _ = scipy.linalg.lstsq(A[i], B[i], cond=rcond[i], lapack_driver=driver)
        assert int(result.rank[i]) == rank
        kept = s[i, rank - 1]
        if driver == "gelsd" or shape[0] > shape[1]:
            np.testing.assert_allclose(
                result.solution[i], x, atol=1e4 * np.finfo(float).eps * np.linalg.norm(B[i]) / kept**2
            )


@pytest.mark.parametrize("driver", ["gels", "gelsd", *slow("gelsy", "gelss")])
def test_parity_with_pytorch(driver, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    for shape in ((3, 7, 4), (3, 4, 7)):
        A, B = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], 2))
        ours = lstsq(A, B, driver=driver)
        theirs = torch.linalg.lstsq(torch.tensor(A), torch.tensor(B), driver=driver)
        np.testing.assert_allclose(ours.solution, theirs.solution, atol=1e-11)
        for name in ("residuals", "rank", "singular_values"):
            value = getattr(theirs, name).numpy()
            if value.size:
                np.testing.assert_allclose(getattr(ours, name), value, atol=1e-11)


BAD = [
    pytest.param(driver, shape, marks=() if first else pytest.mark.slow)
    for driver in DRIVERS
    for shape, first in [
        ((3000, 12), driver == "gelsd"), ((12, 3000), False), ((500, 500), driver == "gelsd"),
        ((300, 100, 100), False), ((1000, 64, 32), False), ((10000, 8, 3), False),
        ((20000, 50), False), ((300, 30, 160), False),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("driver", "shape"), BAD)
@pytest.mark.parametrize("bad", [np.nan, *slow(np.inf)], ids=str)
def test_bad_values_in_large_arrays(driver, shape, bad, x64):
    """XLA on CPU loses NaN in a maximum over so many entries. Neighbours: the same to the bit."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], 2))
    spoiled, at = A.copy(), (5,) if len(shape) == 3 else ()
    spoiled[*at, 7 % shape[-2], 1] = bad
    columns = B.copy()
    columns[*at, 3, 1] = bad

    def loss(A, B):
        result = lstsq(A, B, driver=driver)
        # NaN must not reach the neighbours through the sum
        return jax.numpy.where(
            np.arange(A.shape[0]) == 5, 0, (result.solution**2).sum((-2, -1))
        ).sum(), result

    fun = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True) if at else lambda A, B: loss(A, B))
    clean, dirty, half = (jax.tree.map(np.asarray, fun(*ab)) for ab in ((A, B), (spoiled, B), (A, columns)))
    (*_, result), (*_, other) = (x[0] if at else x for x in (dirty, half))
    for x in (result.solution, result.residuals, result.singular_values):
        assert x.size == 0 or np.isnan(x[at]).all()
    if driver != "gels":
        assert result.rank[at] == 0
        assert other.rank[at] == min(shape[-2:])
    assert np.isnan(other.solution[*at, :, 1]).all()
    assert np.isfinite(other.solution[*at, :, 0]).all()
    if at:
        others = np.arange(shape[0]) != 5
        for x, y, z in zip(*map(jax.tree.leaves, (clean, dirty, half)), strict=True):
            if x.shape[:1] == shape[:1]:
                assert np.array_equal(x[others], y[others])
                assert np.array_equal(x[others], z[others])


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(10000, 4, 4), (300, 100, 100), (300, 130, 100)],
    ids=str,
)
def test_singular_matrices_in_large_batches(shape, x64):
    """A zero pivot makes NaN in inverses, and no bound may lose it."""
    rng = np.random.default_rng(1)
    A, b = rng.standard_normal(shape), rng.standard_normal(shape[:-1])
    A[7, :, 2], A[8], A[9, :, 1] = 0, 0, A[9, :, 0]
    for driver in DRIVERS[:3]:  # gelss is gelsd on a CPU
        result = lstsq(A, b, driver=driver)
        if driver == "gels":
            assert (np.isnan(result.solution).any(-1) == np.isin(np.arange(shape[0]), [7, 8, 9])).all()
        else:
            assert (result.rank[7:10] == np.array([shape[-1] - 1, 0, shape[-1] - 1])).all()
            assert (np.delete(result.rank, [7, 8, 9]) == shape[-1]).all()
            assert np.isfinite(result.solution).all()
