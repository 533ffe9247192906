"""Reduce: the tall T = Q R, the only step that touches m x n data.

`triangle` gives R alone, `project` R and what a right-hand side needs of Q, `orthonormal` Q itself.
This module chooses how: by products where T is very tall and they are proven stable, else Householder.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from .. import _lanes as lanes
from .._numerics import abs2, cond, flat, mm, native_batch, pick, scaled, small
from .._platform import platform_dependent
from . import cholesky, householder, sketch


def project(
    t: jax.Array, b: jax.Array, down: jax.Array | None = None, rcond: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the squared norms of the columns of (I - Q Q^H) b, of T scaled by `down`.

    To scale T is left to the branch that does the work, so that no copy of it waits in the other. Where
    R is truncated at `rcond`, rows far below that may be zero.
    """
    if lanes.few(t, lanes.PROJECT) and small(b.shape):
        return lanes.project(scaled(t, down), b)
    # Each right-hand side that rides along in QR of [T, b] costs as much as a column of T;
    # beyond about p of them forming Q once is cheaper.
    few = b.shape[-1] <= t.shape[-1]

    def by_householder():
        if few:
            return householder.reduce_augmented(scaled(t, down), b)
        return _with_norms(*householder.split(scaled(t, down), b))

    return _by_sketch(t, down, rcond, lambda z: _with_norms(*sketch.split(z, b)), by_householder, b)


def _with_norms(r: jax.Array, c: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return r, c, abs2(v).sum(-2)


def triangle(t: jax.Array, down: jax.Array | None = None, rcond: jax.Array | None = None) -> jax.Array:
    """R of T = Q R, T scaled by `down`; `rcond` as in `project`."""
    return _by_sketch(t, down, rcond, lambda z: z.r, lambda: householder.triangle(scaled(t, down)))


def squared_residuals(
    t: jax.Array, b: jax.Array, r: jax.Array, c: jax.Array, tail: jax.Array, y: jax.Array
) -> jax.Array:
    """|b - T y|^2 by columns. From R, Q^H b and what T leaves of b where Q is known to be orthonormal.

    cuBLAS's batched QR does not rescale tiny columns as LAPACK does: where columns are repeated, Q is not
    orthonormal beyond the rank (0.003 in float32, 7e-11 in float64), and nor is what it leaves of b.
    """

    def by_triangle(t, b, r, c, tail, y):
        return tail + abs2(c - mm(r, y)).sum(-2)

    def by_products(t, b, r, c, tail, y):
        return abs2(b - mm(t, y)).sum(-2)

    data = t, b, r, c, tail, y
    if t.ndim == 2:
        return by_triangle(*data)
    return platform_dependent(*data, cuda=by_products, default=by_triangle)


def _by_sketch(
    t: jax.Array,
    down: jax.Array | None,
    rcond: jax.Array | None,
    by_products: Callable,
    by_householder: Callable,
    *data: jax.Array,
) -> Any:
    """`by_products` of the preconditioned T where that is worth a try and accepted, else the other."""
    if not sketch.worthwhile(t.shape):
        return by_householder()
    z = sketch.precondition(t, down, rcond)
    # Before the branch, where nothing is kept for it: the other one's scratch then takes the place of Z.
    out = by_products(z)
    return cond(z.accepted, lambda: out, by_householder, t, *data)


def _flat(q: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    return flat(q), r


def _factors(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q (`flat`) and R of a T of any condition number."""

    def by_householder():
        return _flat(*householder.orthonormal(t))

    if not sketch.worthwhile(t.shape):
        return by_householder()
    z = sketch.precondition(t)
    return cond(z.accepted, lambda: _flat(*sketch.orthonormal(z)), by_householder, t)


def _orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    if small(t.shape):
        return _flat(*lanes.qr(t))
    if not cholesky.worthwhile(t.shape, t.dtype):
        return _factors(t)
    gram = cholesky.factor(t)
    accepted = cholesky.products_suffice(gram)
    by_products = _flat(*cholesky.orthonormal(t, gram))

    def otherwise():
        return jax.tree.map(partial(pick, accepted), by_products, _factors(t))

    return cond(accepted.all(), lambda: by_products, otherwise, t)


_batched_orthonormal = native_batch(_orthonormal, 1, (False, False))


def orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q (`flat`) and R of T = Q R, Q of T's shape. Never differentiated.

    T of entries of order one: a Gram matrix squares them.
    """
    q, r = _batched_orthonormal(t)
    return q, r
