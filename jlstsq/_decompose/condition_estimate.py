"""Rank of a pivoted triangle by incremental condition estimation (Bischof 1990; LAPACK xLAIC1, xGELSY).

Column by column, estimates of the largest and smallest singular value of the leading triangle are
updated from approximate left singular vectors x: appending the column [w; gamma] leads to the
2 x 2 eigenproblem of diag(sest^2, 0) + z z^H with z = (x^H w, gamma). The rank is the number of
columns before smin <= rcond smax.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import abs2, varying


def _update(sest: jax.Array, alpha: jax.Array, gamma: jax.Array):
    """One step of both estimates: the new values (2,), and the eigenvectors (s, c) that extend x to [s x; c].

    The first of each pair belongs to the largest singular value. Scaled by the largest of the three,
    so that squares stay in range; the smaller eigenvalue comes from the determinant, without
    cancellation.
    """
    largest = jnp.array([True, False])
    size = jnp.maximum(jnp.maximum(sest, abs(alpha)), abs(gamma))
    unit = jnp.where(size > 0, size, 1)
    sest, alpha, gamma = sest / unit, alpha / unit.astype(alpha.dtype), gamma / unit.astype(alpha.dtype)
    a, d, b = sest**2 + abs2(alpha), abs2(gamma), alpha * gamma.conj()
    top = (a + d + jnp.sqrt((a - d) ** 2 + 4 * abs2(b))) / 2
    root = jnp.sqrt(jnp.where(top > 0, top, 1))
    estimate = jnp.where(largest, root, sest * abs(gamma) / root)
    value = jnp.where(largest, top, estimate**2)
    # Of the two rows of the singular matrix take the one with the larger entry next to b.
    # Computed once: XLA on GPU answers it anew, with other roundings, in every kernel that needs it. Not
    # `materialized`: on CPU that is a call, here one for every column of one matrix of any size.
    by_first = lax.optimization_barrier((a >= d) != largest)
    s = jnp.where(by_first, b, (value - d).astype(b.dtype))
    c = jnp.where(by_first, (value - a).astype(b.dtype), b.conj())
    norm = jnp.sqrt(abs2(s) + abs2(c))
    divisor = jnp.where(norm > 0, norm, 1).astype(b.dtype)
    # Zero: the first row (or column) is already diagonal.
    s = jnp.where(norm > 0, s / divisor, jnp.where(by_first, 0, 1).astype(b.dtype))
    c = jnp.where(norm > 0, c / divisor, jnp.where(by_first, 1, 0).astype(b.dtype))
    return estimate * size, s, c


@partial(jnp.vectorize, signature="(p,p),()->(),()")
def estimate_rank(r: jax.Array, rcond: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of leading columns of the triangle whose estimated smin / smax exceeds rcond, and smax."""
    p = r.shape[-1]
    first = abs(r[0, 0])
    start = first > rcond * first

    def step(j, state):
        rank, going, size, sest, y = state
        sest, s, c = _update(sest, y[:, j], r[j, j])
        going = going & (sest[1] > rcond * sest[0])
        size = jnp.where(going, sest[0], size)
        # x -> [s x; c]
        y = s.conj()[:, None] * y + c.conj()[:, None] * r[j][None]
        return rank + going.astype(int), going, size, sest, y

    # y = x^H R for every column of R at once
    y = jnp.broadcast_to(r[0], (2, p))
    state = (start.astype(int), start, first, jnp.stack([first, first]), y)
    rank, _, size, _, _ = lax.fori_loop(1, p, step, varying(state, r, rcond))
    return rank, size
