"""Householder QR with column pivoting, R P = U Rp, of small matrices, and U^H C for what rides along.

The pivots are those of Businger and Golub (1965): one by one, the column of largest remaining norm. They
depend on the inner products of the columns only, so they are found by Cholesky factorisation of the Gram
matrix with diagonal pivoting (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 10.3),
in panels: a step reads a few rows, not the matrix. The factors are those of QR without pivoting of the
permuted columns, in the platform's library.

A Gram matrix squares: what is left of a column is lost in its rounding errors before the column is. So
pivots are found in stages. A stage ends where the largest remaining norm^2 is below sqrt(eps) of what some
remaining column had at its start, as LAPACK's recomputes its norms (Drmac and Bujanovic 2006, LAPACK Working
Note 176); the next one begins with the Gram matrix of what the QR factorisation has left of the remaining
columns.

All at once they come from a random mixture S R of the rows: Gaussian elimination of (S R)^H with partial
pivoting chooses the column with the largest entry in one random combination of what remains, most often
one of nearly largest norm (Melnichenko, Murray and others 2025, BQRRP). Then Rp is that of QR without
pivoting. Its diagonal need not decrease: whoever truncates it has to look at what is dropped.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import _lanes as lanes
from .._library import lu, triangle
from .._norms import random
from .._numerics import (
    H,
    abs2,
    column_norms,
    cond,
    double_precision,
    inverse_permutation,
    largest_entry,
    mm,
    native_batch,
    pick,
    power_of_two,
    real_dtype,
    scaled,
    small,
    varying,
)
from .._platform import platform_dependent

Factors = tuple[jax.Array, jax.Array, jax.Array]
Pivots = tuple[jax.Array, jax.Array]

# Pivots that are found before the Gram matrix of what they leave is, of one matrix and of a batch.
_PANEL, _BATCHED_PANEL = 128, 32


def pivoted_at_once(a: jax.Array, c: jax.Array) -> Factors:
    """Rp, U^H C and the 0-based permutation with A[:, perm] = U Rp, from the random mixture.

    A (*batch, p, p), C (*batch, p, k).
    """
    p = a.shape[-1]
    perm = pivots(a)
    # U itself would cost as much as this again.
    both = triangle(jnp.concatenate([jnp.take_along_axis(a, perm[..., None, :], axis=-1), c], axis=-1))
    return both[..., :p], both[..., p:], perm


def pivots(a: jax.Array) -> jax.Array:
    """The permutation for A (*batch, rows, p), from the random mixture.

    S = G_1 (x) G_2, small random matrices: applied by products with sqrt(rows) instead of p rows.
    """
    *batch, rows, p = a.shape
    u = math.isqrt(rows - 1) + 1
    v = -(-rows // u)
    # Both are of the same numbers else.
    first, second = jnp.split(random(u + v, u, a.dtype), [u])
    padded = jnp.pad(a, [(0, 0)] * len(batch) + [(0, u * v - rows), (0, 0)])
    by_second = mm(second[:v, :v], padded.reshape(*batch, u, v, p))
    mixture = mm(first, by_second.reshape(*batch, u, v * p)).reshape(*batch, u * v, p)
    _, perm = lu(H(mixture[..., :p, :]))
    return perm.astype(int)


def grading(a: jax.Array) -> jax.Array:
    """The same for the columns of A scaled to norm one: it grades the rows of R for columns of any size."""
    norms = column_norms(a)
    return pivots(a / jnp.where(norms > 0, norms, 1)[..., None, :].astype(a.dtype))


def pivoted_qr(r: jax.Array, c: jax.Array, stop: jax.Array | None = None) -> Factors:
    """The same of a triangle R with the pivots one by one: |diag Rp| does not increase, but by rounding.

    Where no column of a matrix has a norm above its `stop` (*batch) left, the others follow in their order.
    """

    def in_stages(r, c):
        none = jnp.zeros(r.shape[:-2], real_dtype(r.dtype))
        return _in_stages(r, none if stop is None else jnp.maximum(stop, none), c)

    if r.ndim > 2 and small(r.shape, c.shape):
        # `stop` saves nothing there.
        return platform_dependent(r, c, cpu=lanes.pivoted_qr, default=in_stages)
    return in_stages(r, c)


def _stages(r: jax.Array, limit: jax.Array, c: jax.Array) -> Factors:
    """One matrix, or a batch: one that is done stays as it is, whatever its neighbours need."""
    p = r.shape[-1]
    index = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), r.shape[:-1])

    def left(r, count):
        """What is not triangular yet."""
        free = index >= count[..., None]
        return jnp.where(free[..., :, None] & free[..., None, :], r, 0)

    def unfinished(r, count):
        return (count < p) & (jnp.sqrt(abs2(left(r, count)).sum(-2)) > limit[..., None]).any(-1)

    def stage(state):
        r, c, perm, count, now = state
        order, chosen = _pivots(left(r, count), count, limit, now)
        both = triangle(jnp.concatenate([jnp.take_along_axis(r, order[..., None, :], axis=-1), c], axis=-1))
        moved = both[..., :p], both[..., p:], jnp.take_along_axis(perm, order, axis=-1)
        r, c, perm = (pick(now, x, y) for x, y in zip(moved, (r, c, perm), strict=True))
        # One that has nothing above rounding errors left chooses none.
        return r, c, perm, chosen, now & (chosen > count) & unfinished(r, chosen)

    count = jnp.zeros(r.shape[:-2], jnp.int32)
    state = varying((r, c, index, count, unfinished(r, count)), r, limit, c)
    r, c, perm, *_ = lax.while_loop(lambda state: state[-1].any(), stage, state)
    return r, c, perm.astype(int)


def _one_batch_axis(r: jax.Array, limit: jax.Array, c: jax.Array) -> Factors:
    batch = r.shape[:-2]
    out = _stages(
        *(x.reshape(math.prod(batch), *x.shape[len(batch) :]) if batch else x for x in (r, limit, c))
    )
    r, c, perm = (x.reshape(*batch, *x.shape[1:]) if batch else x for x in out)
    return r, c, perm


# Where it is vmapped, JAX would batch what is in double precision where that is off (jax 0.10.2).
_in_stages = native_batch(_one_batch_axis, 2, (False, True, False))


def _pivots(t: jax.Array, count: jax.Array, limit: jax.Array, now: jax.Array) -> Pivots:
    """The order of T's columns, zero but for the last ones from `count` on, and how many of it are pivots.

    Single precision on CPU: from the Gram matrix in double.
    """
    _, down = power_of_two(largest_entry(t, (-2, -1))[0])
    data = scaled(t, down), count, (limit * down) ** 2, now

    def double(t, count, limit, now):
        with double_precision(t.dtype) as wide:
            return _by_cholesky(t.astype(wide), count, limit.astype(real_dtype(wide)), now)

    if jnp.finfo(t.dtype).bits == 32:
        return platform_dependent(*data, cpu=double, default=_by_cholesky)
    return _by_cholesky(*data)


def _by_cholesky(t: jax.Array, count: jax.Array, limit: jax.Array, now: jax.Array) -> Pivots:
    """The same, of a T of order one and squares of limits."""
    p = t.shape[-1]
    index = jnp.arange(p, dtype=count.dtype)
    each = jax.vmap if t.ndim == 3 else lambda fun: fun
    tolerance = float(jnp.finfo(t.dtype).eps) ** 0.5
    panel = min(_BATCHED_PANEL if t.ndim == 3 else _PANEL, p)
    several = panel < p

    def advance(i, s, start, limit, rows, d, place, j, now):
        """One pivot of one matrix: a row of the Cholesky factor, and what it leaves of the diagonal d."""
        # Not argmax, which JAX lowers with the setting of the place where it does so.
        largest = d.max()
        pivot = jnp.where(d == largest, index, p).min()
        now = now & (largest > jnp.maximum(limit, tolerance * jnp.where(d >= 0, start, 0).max()))
        row = s[pivot] - mm(rows[:, pivot].conj(), rows)
        row = row / jnp.sqrt(jnp.where(now, largest, 1)).astype(row.dtype)
        row = jnp.where(now & (d >= 0), row, 0)
        d = jnp.where(d >= 0, jnp.maximum(d - abs2(row), 0), d)
        # Columns that have been pivots have the norm -1.
        d = d.at[pivot].set(jnp.where(now, -1, d[pivot]))
        place = place.at[pivot].set(jnp.where(now, j, place[pivot]))
        return rows.at[i].set(row), d, place, j + now.astype(j.dtype), now

    def panels(state):
        s, d, place, j, now = state

        def step(i, state):
            return each(partial(advance, i))(s, start, limit, *state)

        rows = jnp.zeros((*s.shape[:-2], panel, p), s.dtype)
        rows, *rest = lax.fori_loop(0, panel, step, varying((rows, d, place, j, now), s))
        d, place, j, now = rest
        now = now & (j < p)

        def reduced():
            left = s - mm(H(rows), rows)
            return left, jnp.where(d >= 0, jnp.maximum(jnp.diagonal(left, axis1=-2, axis2=-1).real, 0), d)

        if several:
            s, d = cond(now.any(), reduced, lambda: (s, d), s, rows)
        return s, d, place, j, now

    columns = lax.optimization_barrier(H(t))
    s = mm(columns, H(columns))
    place = jnp.broadcast_to(index, t.shape[:-1])
    free = place >= count[..., None]
    start = jnp.where(free, jnp.diagonal(s, axis1=-2, axis2=-1).real, -1)
    place = jnp.where(free, p + place, place)
    state = varying((s, start, place, count, now), t, limit)
    state = lax.while_loop(lambda state: state[-1].any(), panels, state) if several else panels(state)
    _, _, place, count, _ = state
    # Columns that were never pivots follow, in their order.
    behind = p - lax.cumsum((place >= p).astype(place.dtype), axis=place.ndim - 1, reverse=True)
    return inverse_permutation(jnp.where(place < p, place, behind)), count
