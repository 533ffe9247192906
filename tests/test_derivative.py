"""Derivatives: against finite differences, in every mode, at every rank.

The exhaustive part (order three, every nesting) is `test_derivative_sweep.py`.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from marks import slow, slow_cases

from jlstsq import lstsq

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
SHAPES = {"tall": (5, 3), "square": (3, 3), "wide": (3, 5)}

# The spectrum, rcond and rank. Under "duplicated" columns repeat (`matrix`).
KINDS = {
    "full": ([1, 0.7, 0.4], 1e-9, 3),
    "equal": ([1, 1, 1], 1e-9, 3),
    "cut": ([1, 0.6, 0.1], 0.35, 2),
    "kept equal": ([1, 1, 0.1], 0.35, 2),
    "dropped equal": ([1, 0.1, 0.1], 0.35, 1),
    "deficient": ([1, 0.6, 0], 0.35, 2),
    "duplicated": (None, 0.35, 2),
}


def matrix(kind, driver, shape, dtype):
    """A, rcond and the rank that lstsq decides."""
    rng = np.random.default_rng(1)
    spectrum, rcond, rank = KINDS[kind]
    if spectrum:
        return problems.with_spectrum(rng, *shape, spectrum, dtype), rcond, rank
    columns = problems.orthonormal(rng, shape[0], 2, dtype)[:, np.arange(shape[1]) % 2]
    # Of two equal columns gelsy's choice is arbitrary and flips under perturbation: make them unequal.
    return columns * (np.linspace(1, 0.4, shape[1]) if driver == "gelsy" else 1), rcond, rank


@cache
def derivatives(driver):
    """One compiled function for a loss, its gradient and its Hessian-vector product in two modes.

    The loss weighs solution, residuals and singular values by w. Everything that varies between
    cases is an argument, so that driver, shape and dtype cost one compilation.
    """

    def loss(AB, c, w, rcond):
        x, residuals, _, s = lstsq(*AB, rcond, driver=driver)
        on_x = (c * x).sum().real + (abs(x) ** 2).sum()
        return w[0] * on_x + w[1] * ((residuals**2).sum() + residuals.sum()) + w[2] * (s + s**2).sum()

    @jax.jit
    def everything(AB, d, *constants):
        value, gradient = jax.value_and_grad(loss)(AB, *constants)
        _, forward = jax.jvp(lambda AB: jax.grad(loss)(AB, *constants), (AB,), (d,))
        reverse = jax.grad(lambda AB: inner(jax.grad(loss)(AB, *constants), d))(AB)
        return value, gradient, forward, reverse

    return everything


def inner(g, d):
    return sum((x * y).sum().real for x, y in zip(g, d, strict=True))


def moved(AB, d, step):
    return tuple(a + step * x for a, x in zip(AB, d, strict=True))


def pair(rng, shape, dtype):
    """Random arrays of the shapes of A and of B with two columns."""
    return tuple(problems.right_hand_side(rng, *s, dtype) for s in (shape, (shape[0], 2)))


def check_derivatives(driver, shape, dtype, kind, step=1e-5, tolerance=1e-6):
    """Gradient and Hessian-vector products: forward, reverse over reverse, differences in all directions."""
    rng = np.random.default_rng(9)
    A, rcond, rank = matrix(kind, driver, shape, dtype)
    if driver != "gels":
        assert lstsq(A, A, rcond, driver=driver).rank == rank
    # Singular values are smooth where they are distinct and not zero.
    w = np.array([1, 1, kind in ("full", "cut")], float)
    c = problems.right_hand_side(rng, shape[1], 2, dtype)

    def everything(AB, d):
        return derivatives(driver)(AB, d, c, w, rcond)

    AB, d, other = (A, pair(rng, shape, dtype)[1]), pair(rng, shape, dtype), pair(rng, shape, dtype)
    value, gradient, forward, reverse = everything(AB, d)
    above, below = (everything(moved(AB, d, h), d) for h in (step, -step))
    scale = 1 + max(np.abs(g).max() for g in gradient + forward)
    np.testing.assert_allclose(
        inner(gradient, d), (above[0] - below[0]) / (2 * step), atol=tolerance * scale, err_msg=kind
    )
    for f, r, up, down in zip(forward, reverse, above[1], below[1], strict=True):
        np.testing.assert_allclose(f, r, atol=1e-10 * scale, err_msg=kind)
        np.testing.assert_allclose(f, (up - down) / (2 * step), atol=tolerance * scale, err_msg=kind)
    # Second differences of the value itself: step^2 / 12 of a fourth derivative, 1e-15 / step^2 of rounding.
    h = 1e-4
    second = (everything(moved(AB, d, h), d)[0] - 2 * value + everything(moved(AB, d, -h), d)[0]) / h**2
    np.testing.assert_allclose(inner(forward, d), second, atol=1e-4 * scale, err_msg=kind)
    # other' H d = d' H other: the Hessian's symmetry.
    swapped = everything(AB, other)[2]
    np.testing.assert_allclose(inner(forward, other), inner(swapped, d), atol=1e-10 * scale, err_msg=kind)


def check_finite(driver, shape, dtype):
    """Where something vanishes or coincides: finite everywhere, right where a derivative exists."""
    rng = np.random.default_rng(3)
    G, B = pair(rng, shape, dtype)
    c = problems.right_hand_side(rng, shape[1], 2, dtype)
    d = pair(rng, shape, dtype)
    matrices = {"eye": np.eye(*shape) + 0 * G, "zero": 0 * G, "equal": 1 + 0 * G, "fit": G}
    matrices["duplicated"] = G[:, np.arange(shape[1]) % 2]
    matrices["duplicated fit"] = matrices["duplicated"]
    for kind, A in matrices.items():
        if driver == "gels" and kind not in ("eye", "fit"):
            continue
        b = A @ problems.right_hand_side(rng, shape[1], 2, dtype) if kind.endswith("fit") else B
        everything = derivatives(driver)
        rcond = 1e-15 * max(shape)
        for result in jax.tree.leaves(everything((A, b), d, c, np.ones(3), rcond)):
            assert np.isfinite(result).all(), kind
        if shape[0] > shape[1] and kind in ("fit", "zero"):
            _, gradient, forward, _ = everything((A, b), d, c, np.array([0.0, 1, 0]), rcond)
            r = b * (kind == "zero")
            np.testing.assert_allclose(gradient[0], 0, atol=1e-12)
            np.testing.assert_allclose(gradient[1], 2 * r.conj() * (1 + 2 * (abs(r) ** 2).sum(0)), atol=1e-12)
            if kind == "fit":  # the second derivative of rho is 2 |r'|^2, r' = (I - A A^+) (b' - A' x)
                pinv = np.linalg.pinv(A)
                change = d[1] - d[0] @ (pinv @ b)
                change = change - A @ (pinv @ change)
                np.testing.assert_allclose(inner(forward, d), 2 * (abs(change) ** 2).sum(), rtol=1e-10)


SMOOTH = [  # (driver, shape, dtype, in the default run)
    (driver, shape, dtype, (driver, shape, dtype) in {
        ("gels", "tall", "float64"), ("gels", "wide", "complex128"),
        ("gelsy", "tall", "float64"),
        ("gelsd", "wide", "complex128"),
    })
    for driver in DRIVERS for shape in SHAPES for dtype in ("float64", "complex128")
]  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "shape", "dtype"),
    [pytest.param(*case, marks=() if default else pytest.mark.slow) for *case, default in SMOOTH],
)
def test_every_kind(driver, shape, dtype, x64):
    """Full rank, ties, a discarded 0.1, exact deficiency and zeros, perturbed in every direction."""
    shape, dtype = SHAPES[shape], np.dtype(dtype)
    for kind in KINDS:
        if driver != "gels" or KINDS[kind][2] == 3:
            check_derivatives(driver, shape, dtype, kind)
    check_finite(driver, shape, dtype)


def test_singular_values_at_ties(x64):
    """The sum of squares of tied values is smooth: its gradient is 2 A, at ties and zeros."""
    gradient = jax.jit(jax.grad(lambda A: (lstsq(A, A[:, :1], driver="gelsd").singular_values ** 2).sum()))
    duplicated = np.arange(5.0)[:, None] * np.array([1, 1, 2])
    for A in (np.eye(5, 3), np.zeros((5, 3)), np.ones((5, 3)), duplicated):
        np.testing.assert_allclose(gradient(A), 2 * A, atol=1e-13)


@pytest.mark.parametrize(
    ("driver", "shape"),
    [
        ("gels", "tall"),
        ("gelsy", "tall"),
        ("gelsd", "wide"),
        *slow_cases(("gels", "wide"), ("gelsy", "wide"), ("gelsd", "tall")),
    ],
)
def test_right_hand_side_alone(driver, shape, x64):
    """The derivative in B with A constant is the pseudoinverse, truncated where the solution is."""
    rng = np.random.default_rng(8)
    shape = SHAPES[shape]
    A = problems.with_spectrum(rng, *shape, [1, 0.6, 0.1])
    rcond = 1e-3 if driver in ("gels", "gelsy") else 0.35
    jacobian = jax.jit(jax.jacrev(lambda b: lstsq(A, b, rcond, driver=driver).solution))
    np.testing.assert_allclose(jacobian(np.ones(shape[0])), np.linalg.pinv(A, rcond=rcond), atol=1e-12)


def test_rank_has_no_derivative(x64):
    """A float0 tangent of rank passes through a user's own jvp, vmap and jit, and a second jvp."""
    A, B = np.eye(4, 3), np.ones((4, 1))

    @jax.custom_jvp
    def user(A, B):
        return lstsq(A, B)

    @user.defjvp
    def _(primals, tangents):
        return jax.jvp(lstsq, primals, tangents)

    def forward(A):
        return jax.jvp(lambda A: user(A, B), (A,), (A,))

    def transformed(A):
        tangents = jax.jvp(jax.vmap(lambda A: user(A, B)), (A[None],), (A[None],))[1]
        gradient = jax.grad(lambda A: user(A, B).solution.sum())(A)
        return jax.jvp(forward, (A,), (A,)), tangents, gradient

    ((result, first), (_, second)), vmapped, gradient = jax.jit(transformed)(A)
    assert result.rank == 3
    for tangent in (first, second, vmapped):
        assert np.asarray(tangent.rank).dtype == jax.dtypes.float0
    # Along A itself the solution scales like 1/t.
    np.testing.assert_allclose(first.solution, -result.solution, atol=1e-14)
    np.testing.assert_allclose((gradient * A).sum(), -result.solution.sum(), atol=1e-14)


@pytest.mark.parametrize("driver", ["gelsd", *slow("gelsy")])
def test_rcond_has_no_derivative(driver, x64):
    """Silently zero, also under vmap over rcond and next to a derivative in A."""
    A = problems.with_spectrum(np.random.default_rng(2), 4, 3, [1, 0.6, 0.1])
    B = np.ones((4, 1))

    def loss(A, rcond):
        result = lstsq(A, B, rcond, driver=driver)
        return (result.solution**2).sum() + result.residuals.sum()

    gradient = jax.grad(loss, (0, 1))
    rcond = np.array([1e-3, 0.35, 0.8, 2.0, -1.0])
    in_a, in_rcond = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(A, rcond)
    assert (in_rcond == 0).all()
    single = jax.jit(gradient)
    for i, value in enumerate(rcond):
        np.testing.assert_allclose(in_a[i], single(A, value)[0], atol=1e-12)
    assert jax.jvp(lambda r: loss(A, r), (0.1,), (1.0,))[1] == 0


@pytest.mark.parametrize(
    ("driver", "shape"), [*((driver, (3, 6, 3)) for driver in DRIVERS), ("gelsy", (3, 24, 9))], ids=str
)
def test_neighbours_leave_gradients_alone(driver, shape, x64):
    """NaN and Inf change no bit of the other elements' gradients; a truncated neighbour, rounding only.

    A truncated element sends the whole batch into the other branch, where each keeps its own result,
    but a compiler is free to compile the same arithmetic twice.
    """
    rng = np.random.default_rng(5)
    A, B = rng.standard_normal(shape), rng.standard_normal((*shape[:2], 2))

    def loss(AB, rcond):
        result = lstsq(*AB, rcond, driver=driver)
        return (result.solution**2).sum() + result.residuals.sum()

    fun = jax.jit(jax.grad(loss))
    rcond = np.full(3, 1e-9)
    clean = fun((A, B), rcond)
    for bad in (np.nan, np.inf, "dependent", "threshold", "right-hand side"):
        a, b, cut = A.copy(), B.copy(), rcond.copy()
        if bad == "threshold":
            cut[1] = np.nan
        elif bad == "dependent":
            a[1, :, 2] = a[1, :, 0]
        elif bad == "right-hand side":
            b[1, 0, 0] = np.nan
        else:
            a[1, 2, 1] = bad
        dirty = fun((a, b), cut)
        for x, y in zip(clean, dirty, strict=True):
            rtol = 1e-15 if bad in ("dependent", "threshold") else 0
            np.testing.assert_allclose(x[::2], y[::2], rtol=rtol, atol=rtol)
        healthy = bad == ("threshold" if driver == "gels" else "dependent")
        assert np.isnan(dirty[0][1]).any() != healthy


@pytest.mark.slow
def test_unbatched_derivatives_under_vmap(x64):
    """The Hessian of vmap next to a truncated element; every other nesting is in the sweep."""
    rng = np.random.default_rng(11)
    A = np.stack([problems.with_spectrum(rng, 4, 3, s) for s in ([1, 0.7, 0.5], [1, 0.6, 0.1])])
    B = rng.standard_normal((2, 4, 1))

    def loss(A, B):
        result = lstsq(A, B, 0.35)
        return (result.solution**2).sum() + result.residuals.sum()

    single = jax.jit(jax.hessian(loss))
    batched = jax.jit(jax.hessian(lambda A: jax.vmap(loss)(A, B).sum()))(A)
    for i in range(2):
        np.testing.assert_allclose(batched[i, :, :, i], single(A[i], B[i]), atol=1e-10)
        assert (batched[i, :, :, 1 - i] == 0).all()


def compiled(fun, *args):
    return jax.jit(fun).lower(*args).compile().as_text()


@pytest.mark.cpu
@pytest.mark.parametrize("driver", DRIVERS)
def test_one_factorisation(driver, x64):
    """Value and gradient hold one factorisation of m x n data and no m x m array; gels, gelsy no SVD."""
    B = jnp.ones((300, 2))
    text = compiled(
        jax.value_and_grad(lambda A: lstsq(A, B, driver=driver).solution.sum()), jnp.ones((300, 7))
    )
    check_one_factorisation(text, driver)


def check_one_factorisation(text, driver):
    calls = [line for line in text.splitlines() if "custom-call(" in line]
    factorisations = [line for line in calls if 'custom_call_target="lapack_dgeqrf' in line]
    assert sum("f64[300," in line for line in factorisations) == 1
    assert not any("gesdd" in line and "f64[300," in line for line in calls)
    if driver in ("gels", "gelsy"):
        assert "gesdd" not in text
    assert "f64[300,300" not in text


@pytest.mark.parametrize("shape", [(300, 7), (7, 300), (40, 60, 20)], ids=str)
@pytest.mark.parametrize("driver", ["gels", *slow("gelsy", "gelsd")])
def test_what_waits_for_the_derivative(driver, shape, x64):
    """The data, R and the residuals: less than twice A, not what a derivative makes of them on its way."""
    A, B = jnp.ones(shape), jnp.ones((*shape[:-1], 2))

    def waiting(A, B):
        return jax.vjp(lambda A, B: lstsq(A, B, driver=driver)[:2], A, B)[1]

    kept = jax.tree.leaves(jax.eval_shape(waiting, A, B))
    assert sum(a.size for a in kept if a.dtype == A.dtype) < 2 * A.size


def test_constants_cost_nothing(x64):
    """The derivative in B alone leaves out what A's motion needs: fewer products with the tall matrix."""

    def products(argnums):
        def fun(A, B):
            return jax.grad(lambda A, B: (lstsq(A, B, driver="gels").solution ** 2).sum(), argnums)(A, B)

        text = compiled(fun, jnp.ones((300, 7)), jnp.ones((300, 2)))
        return sum(" dot(" in line and "300" in line for line in text.splitlines())

    assert products(1) < products(0) <= products((0, 1))


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


@pytest.mark.parametrize("shape", [(20, 8), *slow((12, 8))], ids=str)
@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_values_with_derivatives(driver, shape, x64):
    """Computed with the factors, also where much is truncated: those of the plain call."""
    rng = np.random.default_rng(0)
    A = problems.with_spectrum(rng, *shape, np.linspace(1, 0.02, shape[1]))
    b = rng.standard_normal((shape[0], 2))

    def fun(A):
        return lstsq(A, b, 0.35, driver=driver)[:2]

    plain, primal = jax.jit(lambda A: (fun(A), jax.linearize(fun, A)[0]))(A)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), plain, primal)
    np.testing.assert_allclose(primal[1], ((b - A @ primal[0]) ** 2).sum(0), rtol=1e-12)


def test_small_singular_values_in_float32():
    """Their vectors are orthogonal to the others, whatever rounding made of them: no motion of s_1 in s_n."""
    rng = np.random.default_rng(1)
    A = problems.with_spectrum(rng, 60, 6, [2.0, 1.8, 1.6, 1.3, 1.0, 1e-4]).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda A: lstsq(A, A[:, 0], driver="gelsd").singular_values[-1]))(A)
    u, _, vh = np.linalg.svd(A.astype(float), full_matrices=False)
    moved = u.T @ np.asarray(gradient, float) @ vh.T
    moved[-1, -1] -= 1
    assert abs(moved).max() < 1e-5
