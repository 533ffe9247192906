"""Many small matrices at once: the kernels against NumPy, and gelsd's decision, which has no other path."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import scipy.linalg
from marks import slow, slow_cases

from jlstsq import _batch_last, _blocks, _kernel, lstsq
from jlstsq import _lanes as lanes
from jlstsq._kernel import _KNOWN, one_kernel
from jlstsq._numerics import mm
from jlstsq._platform import platform_dependent


def triangles(p, dtype):
    """A batch with repeated, zero and scaled columns and rows, matrices of zeros and identities."""
    rng = np.random.default_rng(p)
    A = problems.right_hand_side(rng, 300 * p, p, dtype).reshape(300, p, p)
    A[:40, :, -1] = A[:40, :, 0]
    A[40:80, p // 2] = 0
    A[80:120] *= 10.0 ** rng.uniform(-12, 12, (40, 1, p))
    A[120:160] *= 10.0 ** rng.uniform(-12, 12, (40, p, 1))
    A[160:170], A[170:180] = 0, np.eye(p)
    return A.astype(dtype)


def in_library(fun, *shapes):
    """Whether XLA on CPU gives a sum or maximum of it to a library (`_kernel.LIBRARY`)."""
    data = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return "ynn_fusion" in jax.jit(fun).lower(*data).compile().as_text()


def test_sums_stay_in_loops():
    if not in_library(lambda a: (a * a).sum(0), (8, 512)):
        pytest.skip("this XLA, or this processor, has no such library")
    assert not in_library(lambda a: (a * a).sum(0), (8, 511))
    assert not in_library(lanes.qr, (1000, 8, 8))
    assert not in_library(lanes.pivoted_qr, (1000, 8, 8), (1000, 8, 1))


def marked(compiled):
    """How many calls of a program XLA on CPU compiled as one kernel (`_kernel`)."""
    text = compiled.as_text()
    return sum(" call(" in line and "xla_cpu_small_call" in line for line in text.splitlines())


def test_one_kernel():
    """Marked where it may be; what XLA would refuse or abort on is not, or not in it."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        pytest.skip("for one CPU device")
    small, large = (jax.ShapeDtypeStruct((rows, 64), jnp.float32) for rows in (63, 64))

    def halves(a, unused):
        return (2 * a).sum(0), a.max(0)

    def compiled(fun, *args):
        return jax.jit(fun).lower(*args).compile()

    fun = one_kernel(halves)
    assert marked(compiled(fun, small, small)) == _KNOWN
    assert marked(compiled(lambda a: fun(a, a)[1], small)) == _KNOWN
    assert marked(compiled(fun, large, small)) == 0
    data = np.random.default_rng(0).integers(-9, 10, (3, 63, 64)).astype(np.float32)
    batched = compiled(jax.vmap(fun, in_axes=(0, None)), data, data[0])
    assert marked(batched) == 0
    for a, b in zip(batched(data, data[0]), halves(data.swapaxes(0, 1), None), strict=True):
        np.testing.assert_array_equal(a, b)
    constant = compiled(lambda: fun(data[0], data[1]))
    np.testing.assert_array_equal(constant()[0], halves(data[0], None)[0])


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(8, 3), *slow((4, 2))], ids=str)
@pytest.mark.parametrize("driver", ["gels", "gelsy", "gelsd"])
def test_everything_in_lanes(driver, shape, monkeypatch):
    """Values and gradients of the smallest have no step that cannot be taken with the batch last."""
    if not _kernel.may_be_marked():
        pytest.skip("elsewhere it goes block by block")
    seen = []

    def batch_last(fun):
        seen.append(fun)
        return _batch_last.batch_last(fun)

    monkeypatch.setattr(_blocks, "batch_last", batch_last)
    monkeypatch.setattr(_blocks, "Unknown", ())
    A, b = np.ones((300, *shape), np.float32), np.ones((300, shape[0], 1), np.float32)

    def loss(A, b):
        result = lstsq(A, b, driver=driver)
        return result.solution.sum() + result.residuals.sum()

    jax.clear_caches()
    jax.eval_shape(jax.value_and_grad(loss, (0, 1)), A, b)
    assert len(seen) >= 2


@pytest.mark.cpu
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_dependent_columns(dtype, marked, monkeypatch):
    """What is left of a column, rounding errors, is the same in every loop that needs it: Q is unitary."""
    if not marked:
        monkeypatch.setattr(_kernel, "may_be_marked", lambda: False)
    rng = np.random.default_rng(0)
    first, second, b = (
        problems.right_hand_side(rng, 300 * m, k, dtype).reshape(300, m, k)
        for m, k in ((5, 1), (1, 3), (5, 2))
    )
    A = first @ second
    jax.clear_caches()  # of the other one's traces
    r, c, tail = jax.jit(lanes.project)(A, b)
    q, r_of_q = jax.jit(lanes.qr)(A)
    jax.clear_caches()
    assert abs(np.linalg.norm(b, axis=1) ** 2 - (abs(c) ** 2).sum(1) - tail).max() < 1e-4
    assert abs(np.linalg.norm(A, axis=(1, 2)) - np.linalg.norm(r, axis=(1, 2))).max() < 1e-4
    assert abs(np.swapaxes(q.conj(), 1, 2) @ q - np.eye(3)).max() < 1e-5
    assert abs(q @ r_of_q - A).max() < 1e-4


@pytest.mark.parametrize("driver", ["gelsd", *slow("gels", "gelsy")])
def test_kernels_of_a_batch(driver, x64):
    """However it is used: one result alone, A its own right-hand sides, constants, two platforms."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((200, 4, 2)), rng.standard_normal((200, 4, 2))
    solve = partial(lstsq, driver=driver)
    with jax.numpy_rank_promotion("raise"):
        program = jax.jit(solve).lower(A, B).compile()
    one_device = jax.default_backend() == "cpu" and jax.device_count() == 1
    assert bool(marked(program)) == (_KNOWN and one_device)
    out = program(A, B)
    np.testing.assert_allclose(out.solution, np.linalg.pinv(A) @ B, rtol=1e-9, atol=1e-12)
    for name in ("residuals", "rank", "singular_values"):
        alone = jax.jit(lambda A, B, name=name: getattr(solve(A, B), name))(A, B)
        np.testing.assert_allclose(alone, getattr(out, name), rtol=1e-12)
    own = jax.jit(lambda A: solve(A, A))(A).solution
    np.testing.assert_allclose(own, np.broadcast_to(np.eye(2), (200, 2, 2)), atol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda: solve(A, B).solution)(), out.solution, rtol=1e-11)
    exported = jax.export.export(jax.jit(solve), platforms=("cpu", "cuda"))(A, B)
    np.testing.assert_allclose(jax.jit(exported.call)(A, B)[0], out.solution, rtol=1e-11)


@pytest.mark.parametrize(
    "shapes", [((8, 3), (3, 3)), ((3, 8), (8, 1)), ((8, 1), (1, 8)), ((8, 8), (8, 8)), ((2, 0), (0, 2))]
)
def test_products_on_cpu(shapes):
    """Sums in loops or XLA's products, whichever a block of so many gets."""
    rng = np.random.default_rng(0)
    product = jax.jit(lambda a, b: platform_dependent(a, b, cpu=mm, default=mm))
    for count in (1, 60, 1000):
        a, b = (rng.integers(-9, 10, (count, *shape)).astype(np.float32) for shape in shapes)
        np.testing.assert_array_equal(product(a, b), a @ b)


@pytest.mark.parametrize(
    ("p", "dtype"),
    [
        (1, "complex128"),
        (2, "float32"),
        (6, "complex128"),
        *slow_cases((1, "float32"), (1, "float64"), (2, "float64"), (2, "complex128")),
        *slow_cases((3, "float32"), (3, "float64"), (3, "complex128"), (6, "float32"), (6, "float64")),
    ],
)
def test_decompositions(p, dtype, x64):
    A = triangles(p, dtype)
    eps, eye = np.finfo(dtype).eps, np.eye(p)
    exact = A.astype(np.result_type(dtype, np.float64))
    size = np.linalg.norm(exact, axis=(-2, -1))
    safe = np.where(size > 0, size, 1)

    def close(a, b, size=1.0, limit=20.0 * p * eps):
        assert (abs(np.asarray(a) - b).max((-2, -1)) <= limit * size).all()

    u, s, vh = (np.asarray(x) for x in jax.jit(lanes.svd)(A))
    close(u.conj().mT @ u, eye)
    close(vh @ vh.conj().mT, eye)
    close(u * s[:, None] @ vh, exact, safe)
    assert (np.diff(s) <= 0).all()
    expected = np.linalg.svd(exact, compute_uv=False)
    close(s[..., None], expected[..., None], safe)
    (alone,) = jax.jit(lanes.singular_values)(A)
    close(alone[..., None], expected[..., None], safe)

    gram = exact.conj().mT @ exact
    values, vectors = jax.jit(lanes.eigh)(gram.astype(dtype))
    close(gram @ np.asarray(vectors), np.asarray(vectors) * np.asarray(values)[:, None], safe**2)

    c = problems.right_hand_side(np.random.default_rng(9), 300 * p, 2, dtype).reshape(300, p, 2).astype(dtype)
    r, d, perm = (np.asarray(x) for x in jax.jit(lanes.pivoted_qr)(A, c))
    taken = np.take_along_axis(exact, perm[:, None], -1)
    norms, rhs = (np.linalg.norm(a, axis=-2)[:, :, None] for a in (taken, c))
    for a, b, scale in (
        (r.conj().mT @ r, taken.conj().mT @ taken, norms * norms.mT),
        (r.conj().mT @ d, taken.conj().mT @ c, norms * rhs.mT),
    ):
        assert (abs(a - b) <= 20 * p * eps * scale).all()
    assert (np.tril(r, -1) == 0).all()
    diagonal = abs(np.diagonal(r, axis1=-2, axis2=-1))
    assert (np.diff(diagonal) <= 10 * p * eps * safe[:, None]).all()
    assert (np.sort(perm) == np.arange(p)).all()


@pytest.mark.parametrize(
    ("driver", "wide"),
    [
        ("gelsd", True),
        ("gelsy", False),
        *slow_cases(("gelsd", False), ("gelsy", True)),
    ],
    ids=str,
)
def test_truncated_batches(driver, wide, x64):
    """Each matrix as LAPACK has it, at any scale, whatever its neighbours are."""
    rng, rcond = np.random.default_rng(0), 1e-9
    m, p, count = 7, 3, 600
    A, B = rng.standard_normal((count, m, p)), rng.standard_normal((count, p if wide else m, 2))
    A[:100, :, 2] = A[:100, :, 0]
    A[100:200] = A[100:200, :, :1] * rng.standard_normal((100, 1, p))
    A[200:250, :, 1], A[250:260] = 0, 0
    A[260:280, :, 0] *= 1e-200
    A[300:400] *= 10.0 ** rng.uniform(-140, 140, (100, 1, 1))
    A[350:400, :, 2] = A[350:400, :, 1]
    B[350:450] *= 10.0 ** rng.uniform(-140, 140, (100, 1, 2))
    B[:4, :, 0] = 0
    A = A.mT if wide else A
    solve = jax.jit(partial(lstsq, driver=driver))
    out = solve(A, B, rcond=rcond)
    for i in range(count):
        size, scale = abs(A[i]).max() or 1.0, np.where(B[i].any(0), abs(B[i]).max(0), 1)
        x, _, rank, s = scipy.linalg.lstsq(A[i] / size, B[i] / scale, cond=rcond, lapack_driver="gelsd")
        assert out.rank[i] == rank
        error = abs(out.solution[i] / scale * size - x).max()
        assert error <= 1e-13 * max(abs(x).max(), 1) / (s[rank - 1] if rank else 1) ** 2
        if driver == "gelsd":
            np.testing.assert_allclose(out.singular_values[i] / size, s, atol=1e-14 * p, rtol=0)
        if not wide:
            rest = ((B[i] / scale - A[i] / size @ x) ** 2).sum(0)
            np.testing.assert_allclose(out.residuals[i] / scale / scale, rest, rtol=1e-11, atol=1e-13)
    # NaN in one matrix or column leaves every bit of the others alone.
    bad_a, bad_b = A.copy(), B.copy()
    bad_a[5, 0, 0], bad_a[300, 1, 1], bad_b[7, 0, 1] = np.nan, np.inf, np.nan
    bad = solve(bad_a, bad_b, rcond=rcond)
    few = solve(A[:20], B[:20], rcond=rcond)
    keep = np.setdiff1d(np.arange(count), [5, 7, 300])
    for a, b, c in zip(out, bad, few, strict=True):
        if a.shape != (0,):
            np.testing.assert_array_equal(a[keep], b[keep])
            np.testing.assert_allclose(a[:20], c, rtol=1e-12, atol=1e-14)
    assert np.isnan(bad.solution[5]).all()
    assert np.isnan(bad.solution[7, :, 1]).all()
    assert (bad.solution[7, :, 0] == out.solution[7, :, 0]).all()
    assert bad.rank[5] == 0
    thresholds = jnp.array([rcond, np.nan, 0.5])
    several = jax.vmap(lambda rc: solve(A[:20], B[:20], rcond=rc))(thresholds)
    np.testing.assert_array_equal(several.solution[0], few.solution)
    assert np.isnan(several.solution[1]).all()
    assert (several.rank[2] <= few.rank).all()


@pytest.mark.single_first
@pytest.mark.parametrize("p", [8, *slow(4)])
def test_hard_spectra_converge(p, precision):
    """Integers of low rank, whose rounding errors collapse; columns that decay to underflow; zero columns."""
    dtype = np.float64 if precision else np.float32
    rng, count, eps = np.random.default_rng(p), 2000, np.finfo(dtype).eps
    t = rng.uniform(0, 1, (count, 8, 1))

    def integers(*shape):
        return rng.integers(-3, 4, (count, *shape)).astype(float)

    kinds = {
        "rank 1": integers(8, 1) @ integers(1, p),
        "rank 2": integers(8, 2) @ integers(2, p),
        "zero columns": integers(8, p) * rng.integers(0, 2, (count, 1, p)),
        "powers": (1000 * t) ** np.arange(p),
        "scaled": integers(8, 1) @ integers(1, p) * 10.0 ** rng.uniform(-6, 6, (count, 1, p)),
        "decays": np.exp(-t * 10 ** np.linspace(-2, 2.5, p)),
        "tiny": integers(8, p) * rng.integers(0, 2, (count, 1, p)) * (1e-200 if precision else 1e-25),
    }
    solve = jax.jit(partial(lstsq, driver="gelsd"))
    for name, A in kinds.items():
        A = A.astype(dtype)
        b = rng.standard_normal((count, 8, 1)).astype(dtype) * abs(A).max()
        exact = A.astype(float)
        s = np.linalg.svd(exact, compute_uv=False)
        cut = 8 * eps * s[:, :1]
        out = solve(A, b)
        assert (abs(out.singular_values - s) <= 20 * eps * s[:, :1]).all(), name
        clear = ((s < cut / 4) | (s > cut * 2)).all(1)
        assert (np.asarray(out.rank) == (s > cut).sum(1))[clear].all(), name
        x = np.asarray(out.solution, float)
        assert np.isfinite(x).all(), name
        # The gradient is zero on the kept right singular vectors: normwise backward stable.
        _, _, vh = np.linalg.svd(exact)
        kept = s > cut
        rest = (exact.mT @ (exact @ x - b.astype(float)))[..., 0] / np.where(s[:, :1] > 0, s[:, :1], 1)
        size = s[:, 0] * np.linalg.norm(x, axis=(1, 2)) + np.linalg.norm(b.astype(float), axis=(1, 2))
        along = abs(np.einsum("npq,nq->np", vh, rest)) * kept
        assert (along[clear].max(-1) <= 100 * eps * size[clear]).all(), name


def test_smallest_thresholds(x64):
    D = np.broadcast_to(np.diag([1, 1e-170]), (2, 2, 2))
    for rcond in (0.0, 1e-180):
        out = lstsq(D, np.ones((2, 2, 1)), rcond=rcond, driver="gelsd")
        np.testing.assert_allclose(out.solution[:, :, 0], [[1, 1e170]] * 2)
        assert (out.rank == 2).all()
