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

from .._numerics import abs2


def _update(largest: bool, sest: jax.Array, alpha: jax.Array, gamma: jax.Array):
    """One step: the new estimate, and the eigenvector (s, c) that extends x to [s x; c].

    Scaled by the largest of the three, so that squares stay in range; the smaller eigenvalue comes
    from the determinant, without cancellation.
    """
    size = jnp.maximum(jnp.maximum(sest, abs(alpha)), abs(gamma))
    unit = jnp.where(size > 0, size, 1)
    sest, alpha, gamma = sest / unit, alpha / unit.astype(alpha.dtype), gamma / unit.astype(gamma.dtype)
    a, d, b = sest**2 + abs2(alpha), abs2(gamma), alpha * gamma.conj()
    gap = jnp.sqrt((a - d) ** 2 + 4 * abs2(b))
    top = (a + d + gap) / 2
    root = jnp.sqrt(jnp.where(top > 0, top, 1))
    if largest:
        estimate, value = root, top
        # A first row (or column) that is already diagonal
        spare_s, spare_c = jnp.where(a >= d, 1, 0), jnp.where(a >= d, 0, 1)
    else:
        estimate = sest * abs(gamma) / root
        value = estimate**2
        spare_s, spare_c = jnp.where(a >= d, 0, 1), jnp.where(a >= d, 1, 0)
    # Of the two rows of the singular matrix take the one with the larger entry next to b.
    by_first = (a >= d) != largest
    s = jnp.where(by_first, b, (value - d).astype(b.dtype))
    c = jnp.where(by_first, (value - a).astype(b.dtype), b.conj())
    norm = jnp.sqrt(abs2(s) + abs2(c))
    divisor = jnp.where(norm > 0, norm, 1).astype(b.dtype)
    s = jnp.where(norm > 0, s / divisor, spare_s.astype(b.dtype))
    c = jnp.where(norm > 0, c / divisor, spare_c.astype(b.dtype))
    return estimate * jnp.where(size > 0, size, 0), s, c


@partial(jnp.vectorize, signature="(p,p),()->()")
def estimate_rank(r: jax.Array, rcond: jax.Array) -> jax.Array:
    """The number of leading columns of the triangle whose estimated smin / smax exceeds rcond."""
    p = r.shape[-1]
    first = abs(r[0, 0])
    x = jnp.zeros(p, r.dtype).at[0].set(1)
    start = first > rcond * first

    def step(j, state):
        rank, going, smax, smin, xmax, xmin = state
        column = jnp.where(jnp.arange(p) < j, r[:, j], 0)
        gamma = r[j, j]
        dot = partial(jnp.vdot, precision=lax.Precision.HIGHEST)
        smax_new, s1, c1 = _update(True, smax, dot(xmax, column), gamma)
        smin_new, s2, c2 = _update(False, smin, dot(xmin, column), gamma)
        going = going & (smin_new > rcond * smax_new)
        xmax = (s1 * xmax).at[j].set(c1)
        xmin = (s2 * xmin).at[j].set(c2)
        return rank + going.astype(int), going, smax_new, smin_new, xmax, xmin

    state = (start.astype(int), start, first, first, x, x)
    return lax.fori_loop(1, p, step, state)[0]
