"""Householder QR by the platform's library: backward stable for every T.

Values need no Q: the QR factorisation of [T, b] gives R, Q^H b and, in its trailing block, the
residual norms (Golub 1965; Bjorck, Numerical Methods for Least Squares Problems, 1996, section 2.4).
"""

import jax
import jax.numpy as jnp

from .. import _library as library
from .._numerics import H, abs2, many_terms, mm


def triangle(t: jax.Array) -> jax.Array:
    """R of T = Q R."""
    return library.triangle(t)


def orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of T = Q R, Q of T's shape."""
    return library.qr(t)


def reduce_augmented(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the residual norms from R of [T, b]."""
    p = t.shape[-1]
    # Joined as columns, in the order that LAPACK reads: one copy, not two.
    r = triangle(jnp.concatenate([t.mT, b.mT], axis=-2).mT)
    return r[..., :p, :p], r[..., :p, p:], abs2(r[..., p:, p:]).sum(-2)


def split(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and (I - Q Q^H) b, from an explicit Q."""
    q, r = orthonormal(t)
    return r, *apart(q, b)


def apart(q: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q^H b and (I - Q Q^H) b."""
    c = mm(H(q), b)
    v = b - mm(q, c)
    if many_terms(q):
        step = mm(H(q), v)
        c, v = c + step, v - mm(q, step)
    return c, v
