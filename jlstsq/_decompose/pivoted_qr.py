"""Householder QR with column pivoting, R P = U Rp, as a `lax` loop over one small matrix.

Column norms are downdated, and recomputed where Drmac and Bujanovic's test (LAPACK Working Note
176, 2006; xLAQP2) says that the downdate has lost its digits. Reflectors are stored as LAPACK does,
below the diagonal with their scales in tau: H_j = I - tau_j v_j v_j^H, v_j(j) = 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .._library import householder_product
from .._numerics import abs2


def _reflector(x: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v, tau, beta with (I - conj(tau) v v^H) x = beta e_j for the entries from j on (xLARFG)."""
    rows = jnp.arange(x.shape[0])
    alpha = x[j]
    below = jnp.where(rows > j, x, 0)
    tail = abs2(below).sum()
    norm = jnp.sqrt(abs2(alpha) + tail)
    beta = jnp.where(alpha.real > 0, -norm, norm)
    # Nothing to reflect: H_j = I, as in LAPACK. A complex pivot is still made real.
    trivial = (tail == 0) & (alpha.imag == 0 if jnp.iscomplexobj(x) else True)
    safe_beta = jnp.where(trivial | (norm == 0), 1, beta).astype(x.dtype)
    tau = jnp.where(trivial, 0, (safe_beta - alpha) / safe_beta)
    pivot = jnp.where(trivial, 1, alpha - safe_beta)
    v = jnp.where(rows == j, 1, below / pivot)
    return v, tau, jnp.where(trivial, alpha, beta.astype(x.dtype))


def pivoted_qr(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, Rp and the 0-based permutation with A[:, perm] = U Rp and |diag Rp| not increasing."""
    vectors, taus, perm = _factor(a)
    return householder_product(vectors, taus), jnp.triu(vectors), perm


@partial(jnp.vectorize, signature="(p,p)->(p,p),(p),(p)")
def _factor(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    p = a.shape[-1]
    index = jnp.arange(p)
    tolerance = jnp.sqrt(jnp.finfo(a.dtype).eps)
    norms = jnp.sqrt(abs2(a).sum(0))

    def step(j, state):
        a, taus, perm, norms, exact_norms = state
        pivot = jnp.argmax(jnp.where(index >= j, norms, -1))
        swap = jnp.where(index == j, pivot, jnp.where(index == pivot, j, index))
        a, perm, norms, exact_norms = a[:, swap], perm[swap], norms[swap], exact_norms[swap]

        v, tau, beta = _reflector(a[:, j], j)
        row = jnp.matmul(v.conj(), a, precision=lax.Precision.HIGHEST)
        updated = a - jnp.conj(tau) * v[:, None] * jnp.where(index > j, row, 0)[None, :]
        column = jnp.where(index > j, v, jnp.where(index == j, beta, a[:, j]))
        a = jnp.where(index[None, :] == j, column[:, None], updated)

        ratio = abs(a[j]) / jnp.where(norms > 0, norms, 1)
        left = jnp.maximum(0, 1 - ratio**2)
        lost = left * (norms / jnp.where(exact_norms > 0, exact_norms, 1)) ** 2 <= tolerance
        fresh = jnp.sqrt(jnp.where(index[:, None] > j, abs2(a), 0).sum(0))
        norms = jnp.where(lost, fresh, norms * jnp.sqrt(left))
        exact_norms = jnp.where(lost, fresh, exact_norms)
        return a, taus.at[j].set(tau), perm, norms, exact_norms

    state = (a, jnp.zeros(p, a.dtype), index, norms, norms)
    a, taus, perm, _, _ = lax.fori_loop(0, p, step, state)
    return a, taus, perm
