"""gelsy: column-pivoted QR, rank by incremental condition estimation, complete orthogonal factorisation.

    R P = U [R11 R12; 0 R22],   [R11 R12] P^T = L W^H

R22 is dropped, and R_k = U1 L W^H has the minimum-norm pseudoinverse W L^-1 U1^H (LAPACK xGELSY;
Golub and Van Loan, Matrix Computations, 2013, section 5.5.4). Pivoting on R instead of A takes the
same pivots, since the columns of both have the same inner products.
"""

from functools import partial

import jax
import jax.numpy as jnp

from .._library import qr, triangle, triangular_solve
from .._numerics import (
    H,
    abs2,
    cond,
    identity_like,
    indices,
    inverse_permutation,
    largest,
    mm,
    pick,
    taken,
    where_matrix,
)
from .condition_estimate import estimate_rank
from .kept import Kept
from .pivoted_qr import pivoted_at_once, pivoted_qr

# Columns up to which pivots one by one are as fast, for one matrix and for a batch alike.
_FEW = 64
# Units of rounding, per column, that are nothing.
_NOTHING = 10.0
# What is dropped, relative to the last that is kept, where the pivots do not matter.
_GAP = 0.01


def solve(r: jax.Array, rcond: jax.Array, c: jax.Array, adjoint: bool) -> tuple[jax.Array, jax.Array]:
    """R_k^+ c and the rank of R_k; adjoint: y with R y = R_k^+H c. No orthogonal factor is formed.

    R_k is the leading part of the pivoted R whose condition estimate stays above the cut.
    """
    rp, d, perm, kept = _pivoted(r, rcond, c[..., :0] if adjoint else c)
    return _solution(rp, d, perm, kept, c, adjoint), kept.sum(-1)


def _solution(
    rp: jax.Array, d: jax.Array, perm: jax.Array, kept: jax.Array, c: jax.Array, adjoint: bool
) -> jax.Array:
    """What `solve` returns first, from R P = U Rp and d = U^H c."""
    p = rp.shape[-1]
    columns, order = kept[..., None], inverse_permutation(perm)
    both = kept[..., :, None] & kept[..., None, :]
    eye = identity_like(rp)
    square = jnp.where(both, rp, eye)
    if adjoint:
        c = taken(c, perm, -2)

    def whole():
        """Where nothing is dropped the pivoted triangle is all it takes, and no product of two is formed."""
        if adjoint:
            return triangular_solve(square, triangular_solve(square, c, adjoint=True))
        return triangular_solve(square, d)

    def truncated():
        m = H(jnp.where(columns, rp, 0))
        if adjoint:
            # L^H, and W^H c with it
            augmented = triangle(jnp.concatenate([m, c], axis=-1))
            lh, w_c = jnp.where(both, augmented[..., :p], eye), augmented[..., p:]
            y = triangular_solve(lh, jnp.where(columns, w_c, 0))
            return triangular_solve(square, y)
        # The seminormal equations of the minimum-norm solution are as accurate as W (Paige 1973).
        lh = jnp.where(both, triangle(m), eye)
        return mm(m, triangular_solve(lh, triangular_solve(lh, jnp.where(columns, d, 0), adjoint=True)))

    full, y = kept.all(-1), whole()
    if p <= _FEW:
        y = where_matrix(full, y, truncated())
    else:  # a branch costs less than what is in it
        y = cond(full.all(), lambda: y, lambda: where_matrix(full, y, truncated()), rp, d, c)
    return taken(y, order, -2)


def decompose(r: jax.Array, rcond: jax.Array) -> Kept:
    """The factors of R_k."""
    rp, uh, perm, kept = _pivoted(r, rcond, identity_like(r))
    return _factors(H(uh), taken(rp, inverse_permutation(perm), -1), rp, perm, kept)


def decide(
    r: jax.Array, rcond: jax.Array, c: jax.Array, adjoint: bool, turn: bool
) -> tuple[jax.Array | None, jax.Array, jax.Array, jax.Array, jax.Array]:
    """U (None unless asked to `turn` by it), the kept rows of U^H R, y of `solve`, the mask, the pivots."""
    rides = identity_like(r) if turn else c[..., :0] if adjoint else c
    rp, d, perm, kept = _pivoted(r, rcond, rides)
    y = _solution(rp, mm(d, c) if turn and not adjoint else d, perm, kept, c, adjoint)
    order = inverse_permutation(perm)
    rotated = taken(rp, order, -1)
    return H(d) if turn else None, rotated, y, kept, perm


def rebuild(r: jax.Array, perm: jax.Array, kept: jax.Array) -> Kept:
    """`decompose` of U^H R, from what `decide` returned."""
    return _factors(identity_like(r), r, taken(r, perm, -1), perm, kept)


def _pivoted(r: jax.Array, rcond: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
    """Rp, U^H c, the pivots and which of them are kept.

    Pivots taken at once are believed where the columns that are dropped have nothing left: then it is
    all the same which ones were kept. Else they are taken one by one, as xGEQP3 does, to where no
    column has more than rcond smax left.
    """
    p = r.shape[-1]

    def decided(rp, d, perm):
        rank, size = estimate_rank(rp, rcond)
        return (rp, d, perm, indices(perm) < rank[..., None]), size

    def one_by_one():
        stop = rcond * largest(jnp.sqrt(abs2(r).sum(-2)))
        return decided(*pivoted_qr(r, c, stop))[0]

    if p <= _FEW:
        return one_by_one()
    at_once, size = decided(*pivoted_at_once(r, c))
    rp, *_, kept = at_once
    dropped = ~(kept[..., :, None] | kept[..., None, :])
    left = largest(jnp.sqrt(jnp.where(dropped, abs2(rp), 0).sum(-2)))
    nothing = jnp.minimum(rcond, _NOTHING * p * float(jnp.finfo(size.dtype).eps))
    # In the middle of a slope it is not: what is kept has to end well above.
    diagonal = abs(jnp.diagonal(rp, axis1=-2, axis2=-1))
    last = jnp.where(kept, diagonal, jnp.inf).min(-1)
    believed = left <= jnp.minimum(nothing * size, _GAP * last)

    def otherwise():
        return jax.tree.map(partial(pick, believed), at_once, one_by_one())

    return cond(believed.all(), lambda: at_once, otherwise, r, rcond, c)


def _factors(u: jax.Array, r: jax.Array, rp: jax.Array, perm: jax.Array, kept: jax.Array) -> Kept:
    """The kept part of R P = U Rp, from U^H R and Rp."""
    rows, columns = kept[..., :, None], kept[..., None, :]
    eye = identity_like(rp)
    # QR of the kept rows' adjoint, the last row first: L is upper triangular then. Zero columns stay zero
    # under Householder reflections, so what follows the first `rank` columns does not matter.
    rank, index = kept.sum(-1, keepdims=True, dtype=perm.dtype), indices(perm)
    reverse = jnp.where(index < rank, rank - 1 - index, index)
    w, lh = qr(H(taken(jnp.where(rows, r, 0), reverse, -2)))
    w = taken(w, reverse, -1)
    l = taken(taken(H(lh), reverse, -2), reverse, -1)  # noqa: E741
    e = (indices(perm)[..., :, None] == perm[..., None, :]) & columns
    return Kept(
        e=e.astype(rp.dtype),
        r=jnp.where(rows & columns, rp, eye),
        u=jnp.where(columns, u, 0),
        l=jnp.where(rows & columns, l, eye),
        w=jnp.where(columns, w, 0),
        kept=kept,
    )
