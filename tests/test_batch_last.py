"""Functions of batches with the batch moved to the last axis: the same numbers as with it first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jlstsq._batch_last import Unknown, batch_last
from jlstsq._kernel import materialized

LANES = 5


def shapes(a, b):
    """What changes axes, none of which is called as another one."""
    columns = jnp.stack([a[:, 0], b[:, :, 0]], axis=1)
    first, second = jnp.split(jnp.concatenate([a, a[:, :, ::-1]], axis=1), [1], axis=1)
    parts = jnp.unstack(jnp.swapaxes(a, 1, 2), axis=1)
    flat = a.reshape(LANES, -1)
    of_rows = a.reshape(LANES * 3, 4).sum(-1)  # the batch is not an axis there
    padded = jnp.pad(b, ((0, 0), (1, 0), (0, 2)))
    return columns, first, second, parts[2] * 2, flat[:, ::2], of_rows.reshape(LANES, 3), padded, a.mT


def moved_batch(a, b):
    """The batch in every place, and with what has none."""
    last = jnp.moveaxis(a, 0, -1)
    middle = jnp.moveaxis(a, 0, 1)
    eye = jnp.broadcast_to(jnp.eye(3), (LANES, 3, 3))
    scaled = last * jnp.arange(4.0)[None, :, None] + jnp.moveaxis(middle, 1, -1)
    return (
        jnp.moveaxis(scaled, -1, 0),
        eye + a[:, :, :3],
        (a[..., None] * b[:, None]).sum(2),
        last.sum(-1)[None] * a,
    )


def indices(a, b):
    """The same ones for the whole batch, known and not known while tracing."""
    taken = lax.fori_loop(0, 3, lambda j, s: s + a[:, j] * j, jnp.zeros((LANES, 4)))
    put = lax.fori_loop(
        0, 2, lambda j, s: lax.dynamic_update_index_in_dim(s, b[:, j], j + 1, 1), b[:, :3] * 0
    )
    return taken, put, jnp.diagonal(a, axis1=-2, axis2=-1)


def control(a, b):
    """Loops and branches, of the whole batch and with constants that become a batch."""

    def step(state):
        count, total, size = state
        return count + 1, total + a * size[:, None, None], size / 2

    count, total, _ = lax.while_loop(
        lambda state: (state[2] > 0.1).any(), step, (0, jnp.zeros((LANES, 3, 4)), abs(a).sum((1, 2)))
    )
    branch = lax.cond((a > 100).any(), lambda: jnp.zeros((LANES, 4, 3)), lambda: a.mT)
    other = lax.cond((a < 100).all(), lambda: a.sum(1), lambda: jnp.ones((LANES, 4)))
    return jnp.full(LANES, count), total, branch, other


def calls(a, b):
    """Functions with derivatives of their own, linear solves, and results that are computed once."""
    square = a[:, :, :3] + 4 * jnp.eye(3)
    inverse = lax.custom_linear_solve(lambda x: x * 3.0, a, lambda _, y: y / 3.0, symmetric=True)
    once = materialized(lambda x, y: (x + y, x - y), square, square.mT)
    return jax.nn.relu(a), inverse, *once, jax.jit(jnp.sqrt)(abs(b))


@pytest.mark.parametrize("fun", [shapes, moved_batch, indices, control, calls])
def test_same_numbers(fun):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(LANES, *shape)), jnp.float32) for shape in ((3, 4), (4, 4)))
    last = jax.jit(batch_last(fun))(jnp.moveaxis(a, 0, -1), jnp.moveaxis(b, 0, -1))
    first = fun(a, b)
    assert len(last) == len(first)
    for x, y in zip(last, first, strict=True):
        np.testing.assert_allclose(np.moveaxis(x, -1, 0), y, rtol=1e-6, atol=1e-6)


def test_unknown():
    for fun in (lambda a: (jnp.sort(a),), lambda a: (jnp.linalg.inv(a),), lambda a: (a.mT @ a,)):
        with pytest.raises(Unknown):
            jax.eval_shape(batch_last(fun), jnp.zeros((3, 3, LANES)))
