"""Householder QR with column pivoting, R P = U Rp, as a `lax` loop over one small matrix.

Blocked as in LAPACK (Quintana-Orti, Sun and Bischof 1998; xLAQPS): inside a panel of steps the matrix
is a - v f^H with a left alone, so that a step reads it once and writes none of it. Columns stay where
they are, and are put in order at the end. Column norms are downdated, and recomputed where Drmac and
Bujanovic's test (LAPACK Working Note 176, 2006) says that the downdate has lost its digits.
Reflectors are stored as LAPACK does, below the diagonal with their scales in tau: H_j = I - tau_j v_j
v_j^H, v_j(j) = 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .._library import householder_product
from .._numerics import H, abs2, mm, reflector, varying

_PANEL = 32


def pivoted_qr(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, Rp and the 0-based permutation with A[:, perm] = U Rp and |diag Rp| not increasing."""
    vectors, taus, perm = _factor(a)
    return householder_product(vectors, taus), jnp.triu(vectors), perm


@partial(jnp.vectorize, signature="(p,p)->(p,p),(p),(p)")
def _factor(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    p = a.shape[-1]
    width = min(p, _PANEL)
    index = jnp.arange(p)
    tolerance = jnp.sqrt(jnp.finfo(a.dtype).eps)

    def step(k, state):
        first, a, v, f, out, taus, perm, norms, exact_norms = state
        j = first + k
        pivot = jnp.argmax(norms)
        x = a[:, pivot] - mm(v, f[pivot].conj())
        vj, tau, beta = reflector(x, j)
        out = out.at[:, pivot].set(jnp.where(index > j, vj, jnp.where(index == j, beta, x)))
        row = mm(vj.conj(), a) - mm(mm(vj.conj(), v), H(f))
        v = v.at[:, k].set(vj)
        f = f.at[:, k].set((jnp.conj(tau) * row).conj())

        # Columns that have been pivots have the norm -1.
        norms = norms.at[pivot].set(-1)
        left = norms >= 0
        top = a[j] - mm(v[j], H(f))
        ratio = abs(top) / jnp.where(norms > 0, norms, 1)
        rest = jnp.maximum(0, 1 - ratio**2)
        lost = rest * (norms / jnp.where(exact_norms > 0, exact_norms, 1)) ** 2 <= tolerance
        norms = jnp.where(left, norms * jnp.sqrt(rest), norms)

        def recomputed():
            # A constant from outside has no varying axes, and batching a cond loses count (jax 0.10.2).
            below = jnp.arange(p)[:, None] > j
            fresh = jnp.sqrt(jnp.where(below, abs2(a - mm(v, H(f))), 0).sum(0))
            return jnp.where(left & lost, fresh, norms), jnp.where(left & lost, fresh, exact_norms)

        norms, exact_norms = lax.cond((left & lost).any(), recomputed, lambda: (norms, exact_norms))
        return first, a, v, f, out, taus.at[j].set(tau), perm.at[j].set(pivot), norms, exact_norms

    def panel(n, state):
        first = n * width
        a, *rest = state
        empty = jnp.zeros((p, width), a.dtype)
        start = (first, a, empty, empty, *rest)
        _, a, v, f, *rest = lax.fori_loop(0, jnp.minimum(width, p - first), step, varying(start))
        return (a - mm(v, H(f)), *rest)

    norms = jnp.sqrt(abs2(a).sum(0))
    state = (a, jnp.zeros_like(a), jnp.zeros(p, a.dtype), index, norms, norms)
    _, out, taus, perm, _, _ = lax.fori_loop(0, -(-p // width), panel, varying(state))
    return out[:, perm], taus, perm
