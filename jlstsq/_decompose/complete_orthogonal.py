"""gelsy: column-pivoted QR, rank by incremental condition estimation, complete orthogonal factorisation.

    R P = U [R11 R12; 0 R22],   [R11 R12] P^T = L W^H

R22 is dropped, and R_k = U1 L W^H has the minimum-norm pseudoinverse W L^-1 U1^H (LAPACK xGELSY;
Golub and Van Loan, Matrix Computations, 2013, section 5.5.4). Pivoting on R instead of A takes the
same pivots, since the columns of both have the same inner products.
"""

import jax
import jax.numpy as jnp

from .._library import qr
from .._numerics import H
from .condition_estimate import estimate_rank
from .kept import Kept
from .pivoted_qr import pivoted_qr


def decompose(r: jax.Array, rcond: jax.Array) -> Kept:
    """The leading part of the pivoted R whose condition estimate stays above the cut."""
    u, rp, perm = pivoted_qr(r)
    return _factors(u, rp, perm, _kept(rp, rcond))


def decide(r: jax.Array, rcond: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pivots, and the mask of those kept."""
    _, rp, perm = pivoted_qr(r)
    return perm, _kept(rp, rcond)


def rebuild(r: jax.Array, perm: jax.Array, kept: jax.Array) -> Kept:
    """`decompose`, from what `decide` returned."""
    u, rp = qr(jnp.take_along_axis(r, perm[..., None, :], axis=-1))
    return _factors(u, rp, perm, kept)


def _kept(rp: jax.Array, rcond: jax.Array) -> jax.Array:
    return jnp.arange(rp.shape[-1]) < estimate_rank(rp, rcond)[..., None]


def _factors(u: jax.Array, rp: jax.Array, perm: jax.Array, kept: jax.Array) -> Kept:
    """The kept part of R P = U Rp."""
    p = rp.shape[-1]
    rows, columns = kept[..., :, None], kept[..., None, :]
    eye = jnp.eye(p, dtype=rp.dtype)
    # Zero columns stay zero under Householder reflections, so a QR factorisation of the masked
    # [R11 R12]^H is that of its first `rank` columns.
    w, lh = qr(H(jnp.where(rows, rp, 0)))
    w = jnp.take_along_axis(w, jnp.argsort(perm, axis=-1)[..., :, None], axis=-2)
    e = (jnp.arange(p)[:, None] == perm[..., None, :]) & columns
    return Kept(
        e=e.astype(rp.dtype),
        r=jnp.where(rows & columns, rp, eye),
        u=jnp.where(columns, u, 0),
        l=jnp.where(rows & columns, H(lh), eye),
        w=jnp.where(columns, w, 0),
        kept=kept,
    )
