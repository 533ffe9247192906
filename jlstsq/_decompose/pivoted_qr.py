"""Householder QR with column pivoting, R P = U Rp, of one small matrix or a batch.

Pivots are taken one by one, the column of largest remaining norm (Businger and Golub
1965), in a `lax` loop. As in LAPACK (Quintana-Orti, Sun and Bischof 1998; xLAQPS) the matrix is
a - v f^H with a left alone, so that a step reads it once and writes none of it. Columns stay where they
are, and are put in order at the end. Column norms are downdated, and recomputed where Drmac and
Bujanovic's test (LAPACK Working Note 176, 2006) says that the downdate has lost its digits.

All at once they come from a random mixture S R of the rows: Gaussian elimination of (S R)^H with partial
pivoting chooses the column with the largest entry in one random combination of what remains, most often
one of nearly largest norm (Melnichenko, Murray and others 2025, BQRRP). Then Rp is that of QR without
pivoting. Its diagonal need not decrease: whoever truncates it has to look at what is dropped.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .._library import householder_product, lu, qr
from .._norms import random
from .._numerics import H, abs2, mm, reflector, varying

Factors = tuple[jax.Array, jax.Array, jax.Array]


def pivoted_qr(a: jax.Array) -> Factors:
    """U, Rp and the 0-based permutation with A[:, perm] = U Rp, |diag Rp| not increasing."""
    vectors, taus, perm = _factor(a)
    return householder_product(vectors, taus), jnp.triu(vectors), perm


def pivoted_at_once(a: jax.Array) -> Factors:
    """The same from the random mixture; the diagonal may increase."""
    perm = pivots(a)
    return *qr(jnp.take_along_axis(a, perm[..., None, :], axis=-1)), perm


def pivots(a: jax.Array) -> jax.Array:
    """The permutation for A (*batch, rows, p), from the random mixture."""
    rows, p = a.shape[-2:]
    _, perm = lu(H(mm(random(p, rows, a.dtype), a)))
    return perm.astype(int)


@partial(jnp.vectorize, signature="(p,p)->(p,p),(p),(p)")
def _factor(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reflectors below the diagonal of the triangle, as LAPACK stores them, and their scales.

    H_j = I - tau_j v_j v_j^H, v_j(j) = 1.
    """
    p = a.shape[-1]
    index = jnp.arange(p)
    tolerance = jnp.sqrt(jnp.finfo(a.dtype).eps)

    def step(_, state):
        # The count is carried: a loop's own has no varying axes (`recomputed`).
        j, v, f, out, taus, perm, norms, exact_norms = state
        pivot = jnp.argmax(norms)
        x = a[:, pivot] - mm(v, f[pivot].conj())
        vj, tau, beta = reflector(x, j)
        out = out.at[:, pivot].set(jnp.where(index > j, vj, jnp.where(index == j, beta, x)))
        row = mm(vj.conj(), a) - mm(mm(vj.conj(), v), H(f))
        v = v.at[:, j].set(vj)
        f = f.at[:, j].set((jnp.conj(tau) * row).conj())

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
        return j + 1, v, f, out, taus.at[j].set(tau), perm.at[j].set(pivot), norms, exact_norms

    norms = jnp.sqrt(abs2(a).sum(0))
    empty = jnp.zeros_like(a)
    state = (jnp.zeros((), int), empty, empty, empty, jnp.zeros(p, a.dtype), index, norms, norms)
    _, _, _, out, taus, perm, _, _ = lax.fori_loop(0, p, step, varying(state))
    return out[:, perm], taus, perm
