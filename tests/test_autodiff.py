"""The switch that saves nothing for its derivative: that of `lax.switch`, at less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlstsq._autodiff import switch

BRANCHES = (
    lambda a, b: (jnp.sin(a @ b).sum(), a.T @ a),
    lambda a, b: (jnp.cos(a @ b).sum() * 2, a.T @ a * b),
    lambda a, b: ((jnp.exp(a) @ b).prod(), a[:3] * b),
)


def chosen(a, b, index, of=switch):
    if of is switch:
        return switch(index, BRANCHES, a, b)
    return jax.lax.switch(index, BRANCHES, a, b)


def test_every_order_and_mode(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3)), rng.standard_normal(3)

    def scalar(a, b, index, of):
        one, two = chosen(a, b, index, of)
        return one**2 + (two**3).sum()

    def derivatives(a, b, index, of):
        fun, both = lambda a, b: scalar(a, b, index, of), (0, 1)
        return [
            jax.grad(fun, both)(a, b),
            jax.jacfwd(jax.grad(fun, both), both)(a, b),
            jax.jacrev(jax.grad(fun, both), both)(a, b),
            jax.jacfwd(jax.jacfwd(fun, both), both)(a, b),
            jax.jacrev(jax.jacfwd(fun, both), both)(a, b),
        ]

    ours, theirs = (jax.jit(lambda *args, f=f: derivatives(*args, f)) for f in (switch, None))
    for index in range(3):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12),
            ours(a, b, index),
            theirs(a, b, index),
        )


def test_only_some_arguments_move(x64):
    """Derivatives in one operand, along fixed tangents, and under vmap."""
    rng = np.random.default_rng(1)
    a, b, v = rng.standard_normal((6, 3)), rng.standard_normal(3), rng.standard_normal((6, 3))

    def along(v, index, of):
        return jax.jvp(lambda a: chosen(a, b, index, of)[0], (a,), (v,))[1]

    ours, theirs = (jax.jit(lambda v, i, f=f: jax.value_and_grad(along)(v, i, f)) for f in (switch, None))
    for index in range(3):
        for x, y in zip(ours(v, index), theirs(v, index), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)
    many = np.stack([a, v])
    gradients = (
        jax.jit(jax.vmap(jax.grad(lambda a, f=f: chosen(a, b, 1, f)[1].sum() ** 2)))(many)
        for f in (switch, None)
    )
    np.testing.assert_allclose(*gradients, rtol=1e-12)


@pytest.mark.optimised
def test_saves_the_operands_only(x64):
    def many(a):
        return (jnp.sin(a) * jnp.exp(a) * jnp.cos(2 * a) * jnp.sqrt(a)).sum()

    def temporary(of):
        a = jax.ShapeDtypeStruct((50_000, 3), jnp.float64)
        fun = jax.jit(lambda a, i: jax.value_and_grad(lambda a: of(i, (many, jnp.sum), a))(a))
        memory = fun.lower(a, jnp.int32(0)).compile().memory_analysis()
        return memory.temp_size_in_bytes / (50_000 * 3 * 8)

    assert temporary(switch) < 1.1
    assert temporary(jax.lax.switch) > 2.5


def test_keeps_no_tracer(x64):
    """What the rule of one call closes over would live as long as the program that it is part of."""

    def loss(a, index):
        return sum(x.sum() for x in chosen(a, jnp.ones(3), index))

    with jax.checking_leaks():
        jax.grad(jax.jit(loss))(jnp.ones((6, 3)), jnp.int32(1))
