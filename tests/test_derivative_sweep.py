"""Derivatives, exhaustively: order three by JAX's own checker, and every nesting. All of it is slow."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.test_util import check_grads
from test_derivative import (
    DRIVERS,
    KINDS,
    check_one_factorisation,
    compiled,
    derivatives,
    inner,
    matrix,
    moved,
    pair,
)

from jlstsq import lstsq

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

SHAPES = {"tall": (4, 3), "square": (3, 3), "wide": (3, 4)}
CASES = [
    (driver, shape, dtype) for driver in DRIVERS for shape in SHAPES for dtype in ("float64", "complex128")
]


@pytest.mark.parametrize(("driver", "shape", "dtype"), CASES)
def test_check_grads(driver, shape, dtype):
    """A = U V of fixed rank: every chain of forward and reverse mode up to order three.

    Each level is one central difference with step h = 1e-4 of the exact level below, in a direction
    of length |d| = 5 to 8. At singular values 1 a derivative of order j grows like j! |d|^j, so the error
    relative to level j is (j + 1)(j + 2) |d|^2 h^2 / 6, at most 2e-6 for j = 3; rounding is
    eps / h = 2e-12. The tolerance leaves a factor of fifty.
    """
    m, n = SHAPES[shape]
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(6)
    U, V = problems.orthonormal(rng, m, 3, dtype), problems.orthonormal(rng, n, 3, dtype).conj().T
    B = problems.right_hand_side(rng, m, 1, dtype)

    @jax.jit
    def solve(U, V, B, keep):
        return lstsq((U * keep) @ V, B, 1e-9, driver=driver)[:2]

    for rank in (3,) if driver == "gels" else (3, 2):
        keep = np.arange(3) < rank  # an argument, so that both ranks share their programs
        check_grads(lambda *UVB: solve(*UVB, keep), (U, V, B), 3, ("fwd", "rev"), atol=1e-4, rtol=1e-4)  # noqa: B023


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", SHAPES)
def test_check_grads_singular_values(shape, dtype):
    """Singular values to second order, where they are distinct (gaps of 0.3: the error above over 0.3^2)."""
    A = problems.with_spectrum(np.random.default_rng(4), *SHAPES[shape], [1, 0.7, 0.4], np.dtype(dtype))
    fun = jax.jit(lambda A: lstsq(A, A[:, :1], driver="gelsd").singular_values)
    check_grads(fun, (A,), 2, ("fwd", "rev"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("driver", "dtype"), [("gels", "complex64"), ("gelsy", "complex64"), ("gelsd", "float32")]
)
def test_single_precision(driver, dtype):
    """float32 agrees with float64 to some thousand eps, gradient and Hessian-vector product."""
    rng = np.random.default_rng(9)
    double = np.dtype("float64" if dtype == "float32" else "complex128")
    A, rcond, _ = matrix("full" if driver == "gels" else "cut", driver, (5, 3), double)
    AB, d = (A, pair(rng, (5, 3), double)[1]), pair(rng, (5, 3), double)
    arguments = (AB, d, problems.right_hand_side(rng, 3, 2, double), np.ones(3))
    expected = derivatives(driver)(*arguments, rcond)
    low = jax.tree.map(
        lambda a: a.astype(dtype if a.dtype == double and a.ndim > 1 else "float32"), arguments
    )
    for x, y in zip(
        jax.tree.leaves(derivatives(driver)(*low, np.float32(rcond))), jax.tree.leaves(expected), strict=True
    ):
        assert x.dtype == (dtype if np.ndim(x) else "float32")
        np.testing.assert_allclose(x, y, atol=2000 * np.finfo(np.float32).eps * (1 + np.abs(y).max()))


@pytest.mark.parametrize(
    ("driver", "shape", "dtype"),
    [
        ("gelsy", (3, 5), "float64"),
        ("gelsy", (5, 3), "complex128"),
        ("gelsd", (5, 3), "float64"),
        ("gelsd", (3, 5), "complex128"),
    ],
)
def test_third_order_in_every_direction(driver, shape, dtype):
    """The third derivative where something is dropped, in three directions out of the fixed rank.

    On A = U V no test can see what the dropped part contributes. Reverse over forward over reverse
    against central differences (error 1e-10 |d|^2 times a fifth derivative) of the exact second.
    """
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(13)
    d = [pair(rng, shape, dtype) for _ in range(3)]
    c, w = problems.right_hand_side(rng, shape[1], 2, dtype), np.array([1.0, 1, 0])
    b = pair(rng, shape, dtype)[1]

    def product(AB, rcond):
        return inner(derivatives(driver)(AB, d[0], c, w, rcond)[2], d[1])

    third = jax.jit(jax.grad(product))
    for kind in KINDS:
        A, rcond, _ = matrix(kind, driver, shape, dtype)
        exact = third((A, b), rcond)
        above, below = (product(moved((A, b), d[2], h), rcond) for h in (1e-5, -1e-5))
        scale = 1 + max(np.abs(x).max() for x in exact)
        np.testing.assert_allclose(
            inner(exact, d[2]), (above - below) / 2e-5, atol=2e-6 * scale, err_msg=kind
        )


def batch():
    """Three matrices at rcond 0.35, the middle one truncated; right-hand sides; a direction."""
    rng = np.random.default_rng(12)
    spectra = ([1, 0.7, 0.5], [1, 0.6, 0.1], [1, 0.9, 0.6])
    A = np.stack([problems.with_spectrum(rng, 4, 3, s) for s in spectra])
    return A, rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 4, 3))


def make_loss(driver):
    def loss(A, B):
        result = lstsq(A, B, 0.35, driver=driver)
        return jnp.sin(result.solution).sum() + result.residuals.sum()

    return loss


@cache
def expected(driver):
    """Gradient and Hessian of each element in A and B, one call each, without batch or vmap."""
    loss = make_loss(driver)
    single = jax.jit(lambda A, B: (jax.grad(loss, (0, 1))(A, B), jax.hessian(loss)(A, B)))
    A, B, _ = batch()
    (in_a, in_b), hessian = jax.tree.map(lambda *x: np.stack(x), *map(single, A, B))
    return in_a, in_b, hessian


def along(hessian, d):
    return np.einsum("zijkl,zkl->zij", hessian, d)


def blocks(hessian):
    """The diagonal blocks of a batch's Hessian, after a look that all others are zero."""
    index = np.arange(hessian.shape[0])
    off = np.array(hessian)
    off[index, :, :, index] = 0
    assert not off.any()
    return hessian[index, :, :, index]


def close(x, y):
    np.testing.assert_allclose(x, y, atol=1e-10)


# Each nesting: what it computes from (loss, A, B, d), and the part of `expected` that it must equal.
def in_scan(loss):
    def total(A, B):
        return jax.lax.scan(lambda sum_, ab: (sum_ + loss(*ab), None), 0.0, (A, B))[0]

    return total


def summed(loss):
    return lambda A, B: jax.vmap(loss)(A, B).sum()


NESTINGS = {
    "vmap(hessian)": (lambda f, A, B, d: jax.vmap(jax.hessian(f))(A, B), "hessian"),
    "hessian(vmap)": (lambda f, A, B, d: jax.hessian(summed(f))(A, B), "blocks"),
    "hessian(batch)": (lambda f, A, B, d: jax.hessian(f)(A, B), "blocks"),
    "vmap(jacrev(jacfwd))": (lambda f, A, B, d: jax.vmap(jax.jacrev(jax.jacfwd(f)))(A, B), "hessian"),
    "vmap(jacrev(jacrev))": (lambda f, A, B, d: jax.vmap(jax.jacrev(jax.jacrev(f)))(A, B), "hessian"),
    "vmap(jacfwd(jacfwd))": (lambda f, A, B, d: jax.vmap(jax.jacfwd(jax.jacfwd(f)))(A, B), "hessian"),
    "grad(checkpoint(batch))": (lambda f, A, B, d: jax.grad(jax.checkpoint(f), (0, 1))(A, B), "gradient"),
    "grad(scan)": (lambda f, A, B, d: jax.grad(in_scan(f), (0, 1))(A, B), "gradient"),
    "vmap(grad(vmap))": (
        lambda f, A, B, d: jax.tree.map(
            lambda g: g[0], jax.vmap(jax.grad(summed(f), (0, 1)))(A[None], B[None])
        ),
        "gradient",
    ),
    "jvp(vmap(grad))": (
        lambda f, A, B, d: jax.jvp(lambda A: jax.vmap(jax.grad(f))(A, B), (A,), (d,))[1],
        "product",
    ),
    "linearize(grad(batch))": (
        lambda f, A, B, d: jax.linearize(lambda A: jax.grad(f)(A, B), A)[1](d),
        "product",
    ),
    "jvp(grad(scan(checkpoint)))": (
        lambda f, A, B, d: jax.jvp(
            lambda A: jax.grad(in_scan(jax.checkpoint(f)))(A, B), (A,), (d,)
        )[1],
        "product",
    ),
    "grad(jvp(vmap))": (
        lambda f, A, B, d: jax.grad(lambda A: jax.jvp(lambda A: summed(f)(A, B), (A,), (d,))[1])(A),
        "product",
    ),
}  # fmt: skip


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_nesting(driver, nesting):
    """A truncated element next to full-rank ones: each has the derivative that it has alone."""
    fun, kind = NESTINGS[nesting]
    A, B, d = batch()
    result = jax.jit(lambda A, B, d: fun(make_loss(driver), A, B, d))(A, B, d)
    in_a, in_b, hessian = expected(driver)
    if kind == "gradient":
        close(result[0], in_a)
        close(result[1], in_b)
    elif kind == "product":
        close(result, along(hessian, d))
    else:
        close(blocks(result) if kind == "blocks" else result, hessian)


@pytest.mark.parametrize("batched", ["A", "B"])
@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_broadcast(driver, batched):
    """One A against a batch of B and one B against a batch of A, broadcast and by vmap."""
    A, B, d = batch()
    A, B, d = (A, B[:1], d) if batched == "A" else (A[1:2], B, d[:1])
    loss = make_loss(driver)

    @jax.jit
    def derivatives(A, B, d):
        def value_of(fun):
            gradient, product = jax.jvp(lambda A: jax.grad(fun, (0, 1))(A, B), (A,), (d,))
            return *gradient, *product

        axes = (0, None) if batched == "A" else (None, 0)
        by_vmap = jax.vmap(lambda a, b: loss(a.reshape(4, 3), b.reshape(4, 2)), in_axes=axes)
        return value_of(loss), value_of(lambda A, B: by_vmap(A, B).sum())

    @jax.jit
    def alone(A, B, d):
        gradient, product = jax.jvp(lambda A: jax.grad(loss, (0, 1))(A, B), (A,), (d,))
        return *gradient, *product

    # The unbatched A or B meets every element of the other: its derivatives add up.
    each = [np.stack(x) for x in zip(*(alone(A[i % len(A)], B[i % len(B)], d[i % len(d)]) for i in range(3)))]  # noqa: B905
    for result in derivatives(A, B, d):
        for i, (x, y) in enumerate(zip(result, each, strict=True)):
            shared = i % 2 == (1 if batched == "A" else 0)
            close(x, y.sum(0, keepdims=True) if shared else y)


@pytest.mark.parametrize("transform", ["jacrev", "hessian", "value_and_grad"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_one_factorisation(driver, transform):
    """One factorisation of m x n data and no m x m array, whatever is derived."""
    B = jnp.ones((300, 2))

    def solution(A):
        return lstsq(A, B, driver=driver).solution

    fun = {
        "jacrev": jax.jacrev(solution),
        "hessian": jax.hessian(lambda A: solution(A).sum()),
        "value_and_grad": jax.value_and_grad(
            lambda A: sum(x.sum() for x in lstsq(A, B, driver=driver)[:2]),
        ),
    }[transform]
    check_one_factorisation(compiled(fun, jnp.ones((300, 3))), driver)
