"""gelsd and gelss: the singular value decomposition of R, truncated.

R = U S V^H; singular values s_i <= rcond s_1 count as zero (Golub and Kahan 1965; LAPACK xGELSD).
Decomposing the triangle instead of A is Chan's (1982) QR-first SVD.
"""

import jax
import jax.numpy as jnp

from .. import _lanes as lanes
from .. import _library as library
from .._numerics import H, abs2, identity_like, largest, mm, power_of_two
from .._platform import platform_dependent
from .kept import Kept


def values(r: jax.Array, driver: str) -> jax.Array:
    """The singular values of R alone."""
    return library.singular_values(r, qr_iteration=driver == "gelss")


def factors(r: jax.Array, driver: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s, V of R = U diag(s) V^H. gelss takes QR iteration, where the library has the choice."""
    u, s, vh = library.svd(r, qr_iteration=driver == "gelss")
    return u, s, H(vh)


def solve(
    r: jax.Array, rcond: jax.Array, driver: str, c: jax.Array, adjoint: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R_k^+ c, the rank of R_k and all singular values; adjoint: y with R y = R_k^+H c = U_k s^-1 V_k^H c."""
    u, s, v = factors(r, driver)
    kept = _kept(s, rcond)
    return _solution(s, v, kept, mm(H(v if adjoint else u), c), adjoint), kept.sum(-1), s


def _solution(s: jax.Array, v: jax.Array, kept: jax.Array, d: jax.Array, adjoint: bool) -> jax.Array:
    """What `solve` returns first, from d = U^H c, or for the adjoint V^H c, since R v = s u."""
    some = kept & (s > 0)
    inverse = jnp.where(some, 1 / jnp.where(some, s, 1), 0)[..., None].astype(v.dtype)
    return mm(v, inverse * (inverse * d if adjoint else d))


def decompose(r: jax.Array, rcond: jax.Array, driver: str) -> Kept:
    """The part of R above the cut. rcond NaN keeps nothing."""
    u, s, v = factors(r, driver)
    return _factors(u, s, v, _kept(s, rcond))


def decide(
    r: jax.Array, rcond: jax.Array, driver: str, c: jax.Array, adjoint: bool, turn: bool
) -> tuple[jax.Array | None, jax.Array, jax.Array, jax.Array]:
    """U (None unless asked to `turn` by it), diag(s) V^H = U^H R, y of `solve`, and the mask of what is kept.

    U from R V = U diag(s), a QR factorisation, and so are the lengths of the rows: more accurate than the
    SVD's own where columns of very different size are kept.
    """

    def turned(r: jax.Array, c: jax.Array):
        """U, or c^H U; s; diag(s) V^H."""
        _, s, v = factors(r, driver)
        rv = mm(r, v)
        if turn:
            left, rv = library.qr(rv)
        else:
            both = library.triangle(jnp.concatenate([rv, c], axis=-1))
            rv, left = both[..., : r.shape[-1]], H(both[..., r.shape[-1] :])
        signed = jnp.diagonal(rv, axis1=-2, axis2=-1)
        size = abs(signed)
        sign = jnp.where(size > 0, signed / jnp.where(size > 0, size, 1).astype(rv.dtype), 1)
        return left * sign[..., None, :], s, size[..., :, None].astype(v.dtype) * H(v)

    def in_lanes(r: jax.Array, c: jax.Array):
        u, s, rows = lanes.turned(r)
        return u if turn else mm(H(c), u), s, rows

    rides = c[..., :0] if adjoint else c
    if lanes.few(r, lanes.SVD):
        left, s, rows = platform_dependent(r, rides, cpu=in_lanes, default=turned)
    else:
        left, s, rows = turned(r, rides)
    mask = _kept(s, rcond)
    size, v = of_rows(rows)
    d = mm(H(v), c) if adjoint else mm(H(left), c) if turn else H(left)
    return left if turn else None, rows, _solution(size, v, mask, d, adjoint), mask


def of_rows(r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sizes s and V of R = diag(s) V^H."""
    up, down = power_of_two(largest(abs(r)))
    unit = r * down[..., None].astype(r.dtype)
    s = jnp.sqrt(abs2(unit).sum(-1))
    return s * up, H(unit / jnp.where(s > 0, s, 1)[..., None].astype(r.dtype))


def rebuild(r: jax.Array, kept: jax.Array) -> Kept:
    """`decompose` of U^H R = diag(s) V^H."""
    s, v = of_rows(r)
    return _factors(identity_like(r), s, v, kept)


def _kept(s: jax.Array, rcond: jax.Array) -> jax.Array:
    return s > rcond[..., None] * s[..., :1]


def _factors(u: jax.Array, s: jax.Array, v: jax.Array, kept: jax.Array) -> Kept:
    """The kept part of R = U diag(s) V^H."""
    w = jnp.where(kept[..., None, :], v, 0)
    diagonal = jnp.where(kept, s, 1)[..., None, :].astype(u.dtype) * identity_like(u)
    return Kept(e=w, r=diagonal, u=jnp.where(kept[..., None, :], u, 0), l=diagonal, w=w, kept=kept)
