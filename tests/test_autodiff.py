"""The choice that saves nothing for its derivative: that of `lax.cond`, at less memory."""

import jax
import jax.numpy as jnp
import light
import numpy as np
import pytest
from marks import slow

from jlstsq._autodiff import choose, linear_solve, where_used

BRANCHES = (
    lambda a, b: (jnp.sin(a @ b).sum(), a.T @ a),
    lambda a, b: (jnp.cos(a @ b).sum() * 2, a.T @ a * b),
)


def chosen(a, b, flag, of=choose):
    if of is choose:
        return choose(flag, *BRANCHES, a, b)
    return jax.lax.cond(flag, *BRANCHES[::-1], a, b)


def test_every_order_and_mode(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal(3)

    def scalar(a, b, flag, of):
        one, two = chosen(a, b, flag, of)
        return one**2 + (two**3).sum()

    def derivatives(a, b, flag, of):
        fun, both = lambda a, b: scalar(a, b, flag, of), (0, 1)
        return [
            jax.grad(fun, both)(a, b),
            jax.jacfwd(jax.grad(fun, both), both)(a, b),
            jax.jacrev(jax.grad(fun, both), both)(a, b),
            jax.jacfwd(jax.jacfwd(fun, both), both)(a, b),
            jax.jacrev(jax.jacfwd(fun, both), both)(a, b),
        ]

    ours, theirs = (jax.jit(lambda *args, f=f: derivatives(*args, f)) for f in (choose, None))
    for flag in (False, True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12),
            ours(a, b, flag),
            theirs(a, b, flag),
        )


def test_where_used(x64):
    """Every derivative of a linear function, and its adjoint where all or some of a cotangent is zero."""
    rng = np.random.default_rng(3)
    a, x = rng.standard_normal((4, 3)), rng.standard_normal(3)

    def hessian(of):
        def scalar(a, x):
            y, x = of(lambda x: jnp.sin(a) @ x, x)
            return (y**2).sum() * x.sum()

        return jax.jit(jax.jacrev(jax.grad(scalar, (0, 1)), (0, 1)))(a, x)

    ours, theirs = hessian(where_used), hessian(lambda linear, x: (linear(x), x))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-12, atol=1e-13), ours, theirs)
    y, adjoint = jax.vjp(lambda x: where_used(lambda x: a @ x, x)[0], x)
    np.testing.assert_allclose(y, a @ x, rtol=1e-14)
    cotangents = np.array([[0.0, 0, 0, 0], [0, 0, 2, 0]])
    np.testing.assert_array_equal(jax.vmap(adjoint)(cotangents)[0], cotangents @ a)
    np.testing.assert_array_equal(adjoint(jnp.zeros(4))[0], np.zeros(3))


def test_only_some_arguments_move(x64):
    """Derivatives in one operand, along fixed tangents, and under vmap."""
    rng = np.random.default_rng(1)
    a, b, v = rng.standard_normal((6, 3)), rng.standard_normal(3), rng.standard_normal((6, 3))

    def along(v, flag, of):
        return jax.jvp(lambda a: chosen(a, b, flag, of)[0], (a,), (v,))[1]

    ours, theirs = (jax.jit(lambda v, i, f=f: jax.value_and_grad(along)(v, i, f)) for f in (choose, None))
    for flag in (False, True):
        for x, y in zip(ours(v, flag), theirs(v, flag), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)
    many = np.stack([a, v])
    gradients = (
        jax.jit(jax.vmap(jax.grad(lambda a, f=f: chosen(a, b, True, f)[1].sum() ** 2)))(many)
        for f in (choose, None)
    )
    np.testing.assert_allclose(*gradients, rtol=1e-12)


@pytest.mark.cpu
@pytest.mark.optimised
def test_saves_the_operands_only(x64):
    def many(a):
        return (jnp.sin(a) * jnp.exp(a) * jnp.cos(2 * a) * jnp.sqrt(a)).sum()

    def temporary(fun):
        a = jax.ShapeDtypeStruct((50_000, 3), jnp.float64)
        gradient = jax.jit(lambda a, flag: jax.value_and_grad(lambda a: fun(flag, a))(a))
        memory = gradient.lower(a, jnp.bool(False)).compile().memory_analysis()
        return memory.temp_size_in_bytes / (50_000 * 3 * 8)

    assert temporary(lambda flag, a: choose(flag, many, jnp.sum, a)) < 1.1
    assert temporary(lambda flag, a: jax.lax.cond(flag, jnp.sum, many, a)) > 2.5


@pytest.mark.cpu
def test_batch_in_blocks(x64):
    """Each block takes its own branch, by vmap and without; derivatives are those of the elements."""
    where = np.zeros(1000, bool)
    where[[3, 999]] = True
    a = np.random.default_rng(2).standard_normal((1000, 9, 5))

    def common(a, flag):
        return jnp.sin(a).sum((-2, -1))

    def rare(a, flag):
        return jnp.where(flag > 0, jnp.exp(a).sum((-2, -1)), common(a, flag))

    def loss(a):
        return (choose(where, common, rare, a, where.astype(float)) ** 3).sum()

    def by_vmap(a):
        each = jax.vmap(lambda flag, a: choose(flag, common, rare, a, flag.astype(float)))
        return (each(where, a) ** 3).sum()

    def plain(a):
        return (rare(a, where) ** 3).sum()

    v = np.ones_like(a)
    for fun in (loss, by_vmap):
        gradient = jax.jit(jax.value_and_grad(fun))
        assert "while" in gradient.lower(a).compile().as_text()
        for ours, theirs in zip(gradient(a), jax.value_and_grad(plain)(a), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        second = (jax.jvp(jax.grad(f), (a,), (v,))[1] for f in (fun, plain))
        np.testing.assert_allclose(*second, rtol=1e-11, atol=1e-11)


def test_keeps_no_tracer(x64):
    """What the rule of one call closes over would live as long as the program that it is part of."""

    def loss(a, flag):
        return sum(x.sum() for x in chosen(a, jnp.ones(3), flag))

    with jax.checking_leaks():
        jax.grad(jax.jit(loss))(jnp.ones((6, 3)), jnp.bool(True))


@pytest.mark.parametrize("used", ["xy", *slow("x", "y")])
def test_linear_solve_of_a_tree(used, x64):
    """[I A; 0 D] (x, y) = (f, g): every order and mode where any of A, D, f and g moves, and only it."""
    rng = np.random.default_rng(3)
    args = rng.standard_normal((4, 3)), rng.uniform(1, 2, 3), rng.standard_normal(4), rng.standard_normal(3)

    def ours(a, d, f, g):
        constant = jax.lax.stop_gradient((a, d))

        def solve(_, fg):
            y = fg[1] / constant[1]
            return fg[0] - constant[0] @ y, y

        def adjoint(_, fg):
            return fg[0], (fg[1] - fg[0] @ constant[0]) / constant[1]

        return linear_solve(lambda z: (z[0] + a @ z[1], d * z[1]), (f, g), solve, adjoint)

    def theirs(a, d, f, g):
        return f - a @ (g / d), g / d

    for moving in range(4):
        results = []
        for fun in (ours, theirs):

            def loss(z, fun=fun, moving=moving):
                x, y = fun(*(z if i == moving else a for i, a in enumerate(args)))
                return (jnp.sin(x).sum() if "x" in used else 0) + ((y**3).sum() if "y" in used else 0)

            if moving != 2 or used != "y":  # y does not depend on f
                both = jax.jacfwd, jax.jacrev
                second = [o(i(loss)) for i in both for o in both]
                results.append(jax.jit(lambda z, second=second: [f(z) for f in second])(args[moving]))
        results = results[: len(results) // 2], results[len(results) // 2 :]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), *results)


@pytest.mark.cpu
def test_light_compilation():
    """What makes the tests fast is private to JAX: see `light`."""
    before = len(light.counted)
    assert jax.jit(lambda a: a + 1)(1) == 2
    assert len(light.counted) > before
