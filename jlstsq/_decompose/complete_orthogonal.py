"""gelsy: column-pivoted QR, rank by incremental condition estimation, complete orthogonal factorisation.

    R P = U [R11 R12; 0 R22],   [R11 R12] P^T = L W^H

R22 is dropped, and R_k = U1 L W^H has the minimum-norm pseudoinverse W L^-1 U1^H (LAPACK xGELSY;
Golub and Van Loan, Matrix Computations, 2013, section 5.5.4). Pivoting on R instead of A takes the
same pivots, since the columns of both have the same inner products.
"""

from functools import partial

import jax
import jax.numpy as jnp

from .._library import qr
from .._numerics import H, abs2, cond, identity_like, pick
from .condition_estimate import estimate_rank
from .kept import Kept
from .pivoted_qr import pivoted_at_once, pivoted_qr

# Columns up to which pivots one by one are as fast, for one matrix and for a batch alike.
_FEW = 31


def decompose(r: jax.Array, rcond: jax.Array) -> Kept:
    """The leading part of the pivoted R whose condition estimate stays above the cut."""
    return _factors(*_pivoted(r, rcond))


def decide(r: jax.Array, rcond: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U and U^H R, the pivots, and the mask of those kept."""
    u, rp, perm, kept = _pivoted(r, rcond)
    order = jnp.argsort(perm, axis=-1)
    return u, jnp.take_along_axis(rp, order[..., None, :], axis=-1), perm, kept


def rebuild(r: jax.Array, perm: jax.Array, kept: jax.Array) -> Kept:
    """`decompose` of U^H R, from what `decide` returned."""
    return _factors(identity_like(r), jnp.take_along_axis(r, perm[..., None, :], axis=-1), perm, kept)


def _pivoted(r: jax.Array, rcond: jax.Array) -> tuple[jax.Array, ...]:
    """U, Rp, the pivots and which of them are kept.

    Pivots taken at once are believed where no column that is dropped has more than rcond smax left:
    then none could have been kept. Else they are taken one by one.
    """
    p = r.shape[-1]
    index = jnp.arange(p)

    def decided(u, rp, perm):
        rank, size = estimate_rank(rp, rcond)
        kept = index < rank[..., None]
        dropped = ~(kept[..., :, None] | kept[..., None, :])
        left = jnp.sqrt(jnp.where(dropped, abs2(rp), 0).sum(-2)).max(-1)
        return (u, rp, perm, kept), left <= rcond * size

    r = jnp.broadcast_to(r, (*rcond.shape, p, p))
    if p <= _FEW:
        return decided(*pivoted_qr(r))[0]
    at_once, believed = decided(*pivoted_at_once(r))

    def one_by_one():
        return jax.tree.map(partial(pick, believed), at_once, decided(*pivoted_qr(r))[0])

    return cond(believed.all(), lambda: at_once, one_by_one, r, rcond)


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
