"""Reduce: the tall T = Q R, the only step that touches m x n data.

`triangle` gives R alone, `project` R and what a right-hand side needs of Q, `orthonormal` Q itself.
This module chooses how: by products where T is very tall and they are proven stable, else Householder.
"""

from collections.abc import Callable
from typing import Any

import jax

from .._numerics import cond, native_batch, where_matrix
from . import cholesky, householder, lanes, sketch


def scaled(t: jax.Array, down: jax.Array | None) -> jax.Array:
    """T times a power of two a matrix, T itself without one."""
    return t if down is None else t * down[..., None, None].astype(t.dtype)


def project(
    t: jax.Array, b: jax.Array, down: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the squared norms of the columns of (I - Q Q^H) b, of T scaled by `down`.

    To scale T is left to the branch that does the work, so that no copy of it waits in the other.
    """
    # Each right-hand side that rides along in QR of [T, b] costs as much as a column of T;
    # beyond about p of them forming Q once is cheaper.
    by_householder = householder.reduce_augmented if b.shape[-1] <= t.shape[-1] else householder.reduce_apply
    return _by_sketch(t, down, lambda z: sketch.project(z, b), lambda: by_householder(scaled(t, down), b), b)


def triangle(t: jax.Array, down: jax.Array | None = None) -> jax.Array:
    """R of T = Q R, T scaled by `down`."""
    return _by_sketch(t, down, lambda z: z.r, lambda: householder.triangle(scaled(t, down)))


def _by_sketch(
    t: jax.Array, down: jax.Array | None, by_products: Callable, by_householder: Callable, *data: jax.Array
) -> Any:
    """`by_products` of the preconditioned T where that is worth a try and accepted, else the other."""
    if not sketch.worthwhile(t.shape):
        return by_householder()
    z = sketch.precondition(scaled(t, down))
    return cond(z.accepted, lambda: by_products(z), by_householder, t, *data)


def factors(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of a T of any condition number."""
    return _by_sketch(t, None, sketch.orthonormal, lambda: householder.orthonormal(t))


def _orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    if lanes.worthwhile(t.shape):
        return lanes.orthonormal(t)
    if not cholesky.worthwhile(t.shape, t.dtype):
        return factors(t)
    gram = cholesky.factor(t)
    q, r = cholesky.orthonormal(t, gram)

    def otherwise():
        other_q, other_r = factors(t)
        return where_matrix(gram.accepted, q, other_q), where_matrix(gram.accepted, r, other_r)

    return cond(gram.accepted.all(), lambda: (q, r), otherwise, t)


_batched_orthonormal = native_batch(_orthonormal, 1, (False, False))


def orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of T = Q R, Q of T's shape. Never differentiated.

    T of entries of order one: a Gram matrix squares them.
    """
    q, r = _batched_orthonormal(t)
    return q, r
