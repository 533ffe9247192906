"""Householder QR with column pivoting, R P = U Rp, of small matrices, and U^H C for what rides along.

Pivots are taken one by one, the column of largest remaining norm (Businger and Golub
1965), in a `lax` loop. As in LAPACK (Quintana-Orti, Sun and Bischof 1998; xLAQPS) the matrix is
a - v f^H with a left alone, so that a step reads it once and writes none of it. Columns stay where they
are, and are put in order at the end. Column norms are downdated, and recomputed where Drmac and
Bujanovic's test (LAPACK Working Note 176, 2006) says that the downdate has lost its digits. The loop ends
where no column has enough left to matter.

All at once they come from a random mixture S R of the rows: Gaussian elimination of (S R)^H with partial
pivoting chooses the column with the largest entry in one random combination of what remains, most often
one of nearly largest norm (Melnichenko, Murray and others 2025, BQRRP). Then Rp is that of QR without
pivoting. Its diagonal need not decrease: whoever truncates it has to look at what is dropped.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from .. import _lanes as lanes
from .._library import lu, triangle
from .._norms import random
from .._numerics import H, abs2, cond, indices, inverse_permutation, mm, power_of_two, reflector, varying

Factors = tuple[jax.Array, jax.Array, jax.Array]


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


def pivoted_qr(a: jax.Array, c: jax.Array, stop: jax.Array | None = None) -> Factors:
    """The same one by one, |diag Rp| not increasing.

    Where no column of a matrix has a norm above its `stop` (*batch) left, what is left is not made
    triangular, but cut off below the diagonal.
    """
    if lanes.few(a, lanes.PIVOTED_QR) and lanes.worthwhile(c.shape):
        # `stop` saves nothing there.
        return lax.platform_dependent(
            a, c, cpu=lanes.pivoted_qr, default=lambda a, c: _one_by_one(a, c, stop)
        )
    return _one_by_one(a, c, stop)


def _one_by_one(a: jax.Array, c: jax.Array, stop: jax.Array | None) -> Factors:
    *batch, p, _ = a.shape
    flat_a, flat_c = (x.reshape(math.prod(batch), p, x.shape[-1]) if batch else x for x in (a, c))
    limit = jnp.full(batch, -1.0, jnp.finfo(a.dtype).dtype) if stop is None else stop
    r, c, perm = _loop(flat_a, flat_c, limit.reshape(flat_a.shape[:-2]))
    return r.reshape(a.shape), c.reshape(*batch, *c.shape[-2:]), perm.reshape(*batch, p)


def _loop(a: jax.Array, c: jax.Array, stop: jax.Array) -> Factors:
    """One matrix, or a batch: one that is done stays as it is, whatever its neighbours need."""
    p = a.shape[-1]
    index = jnp.arange(p)
    tolerance = jnp.sqrt(jnp.finfo(a.dtype).eps)
    each = jax.vmap if a.ndim == 3 else lambda fun: fun

    def advance(going, j, a, v, f, out, c, place, norms, exact_norms):
        """One step for one matrix; the column norms that have lost their digits as well."""
        pivot = jnp.argmax(norms)
        x = a[:, pivot] - mm(v, f[pivot].conj())
        up, down = power_of_two(norms[pivot])
        vj, tau, beta = reflector(x * down.astype(x.dtype), j)
        vj, tau = jnp.where(going, vj, 0), jnp.where(going, tau, 0)
        column = jnp.where(index > j, 0, jnp.where(index == j, beta * up.astype(x.dtype), x))
        out = out.at[:, pivot].set(jnp.where(going, column, out[:, pivot]))
        row = mm(vj.conj(), a) - mm(mm(vj.conj(), v), H(f))
        v = v.at[:, j].set(vj)
        f = f.at[:, j].set((jnp.conj(tau) * row).conj())
        c = c - (jnp.conj(tau) * vj)[:, None] * mm(vj.conj(), c)[None]
        place = place.at[pivot].set(jnp.where(going, j, place[pivot]))

        # Columns that have been pivots have the norm -1.
        norms = norms.at[pivot].set(jnp.where(going, -1, norms[pivot]))
        top = a[j] - mm(v[j], H(f))
        ratio = abs(top) / jnp.where(norms > 0, norms, 1)
        rest = jnp.maximum(0, 1 - ratio**2)
        lost = rest * (norms / jnp.where(exact_norms > 0, exact_norms, 1)) ** 2 <= tolerance
        left = going & (norms >= 0)
        norms = jnp.where(left, norms * jnp.sqrt(rest), norms)
        return v, f, out, c, place, norms, left & lost

    def unfinished(j, norms):
        return (j < p) & (norms > stop[..., None]).any(-1)

    def going(state):
        j, *_, norms, _ = state
        return unfinished(j, norms).any()

    def step(state):
        j, v, f, out, c, place, norms, exact_norms = state
        now = unfinished(j, norms)
        v, f, out, c, place, norms, lost = each(advance)(now, j, a, v, f, out, c, place, norms, exact_norms)

        def recomputed():
            below = indices(place) > j[..., None]
            fresh = jnp.sqrt(jnp.where(below[..., None], abs2(a - mm(v, H(f))), 0).sum(-2))
            return jnp.where(lost, fresh, norms), jnp.where(lost, fresh, exact_norms)

        norms, exact_norms = cond(lost.any(), recomputed, lambda: (norms, exact_norms), a, norms)
        return j + now.astype(j.dtype), v, f, out, c, place, norms, exact_norms

    norms = jnp.sqrt(abs2(a).sum(-2))
    empty = jnp.zeros_like(a)
    place = jnp.broadcast_to(p + index, norms.shape)
    state = (jnp.zeros(norms.shape[:-1], int), empty, empty, a, c, place, norms, norms)
    _, v, f, out, c, place, *_ = lax.while_loop(going, step, varying(state, a, c, stop))
    out = jnp.where(place[..., None, :] < p, out, a - mm(v, H(f)))
    # Columns that were never pivots follow, in their order.
    behind = p - lax.cumsum((place >= p).astype(place.dtype), axis=place.ndim - 1, reverse=True)
    perm = inverse_permutation(jnp.where(place < p, place, behind))
    return jnp.triu(jnp.take_along_axis(out, perm[..., None, :], axis=-1)), c, perm
