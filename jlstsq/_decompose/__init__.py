"""Decompose: what of the triangle R is kept, and its pseudoinverse. The only place drivers differ.

gels keeps everything; gelsy truncates a pivoted QR (`complete_orthogonal`), gelsd and gelss the SVD
(`svd`). Where the certificate (`certificate`) proves that nothing is truncated, all four are R^-1.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._library import triangular_solve
from .._numerics import identity_like, native_batch, where_matrix
from . import certificate, complete_orthogonal, svd
from .kept import Kept

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")


class Decision(NamedTuple):
    """The kept part of each R of a batch, and where it is everything."""

    kept: Kept
    full: jax.Array  # (*batch) bool: nothing truncated, so kept is not used
    usable: jax.Array  # (*batch) bool: False where gels must answer NaN


def _truncate(driver: str, r: jax.Array, rcond: jax.Array) -> Kept:
    """The driver's own decomposition of R, with its rank decision."""
    if driver == "gelsy":
        return complete_orthogonal.decompose(r, rcond)
    return svd.decompose(r, rcond, driver)


def _whole(r: jax.Array) -> Kept:
    """The decomposition that keeps everything: R = I R I^H."""
    eye = identity_like(r)
    kept = jnp.ones(r.shape[:-1], bool)
    return Kept(e=eye, r=r, u=eye, l=eye, w=eye, kept=kept)


def _solve_full(r: jax.Array, b: jax.Array, adjoint: bool) -> jax.Array:
    """R^-1 b, or for the adjoint problem R^-1 R^-H b."""
    if adjoint:
        b = triangular_solve(r, b, adjoint=True)
    return triangular_solve(r, b)


@cache
def solver(driver: str, adjoint: bool):
    """The values' path: (R, rcond, ok, c) -> (y, rank, usable), one branch for a whole batch.

    y = T^+ b for c = Q^H b; for the adjoint problem y has T y = T^+H c. Where ok is False, R holds
    NaN or Inf and nothing is decided. The branch depends on the whole batch, so it keeps the fast
    result of every element that was certified: no answer depends on its neighbours.
    """

    def solve(r, rcond, ok, c):
        p = r.shape[-1]
        safe = where_matrix(ok, r, identity_like(r))
        if driver == "gels":
            usable = certificate.independent(safe)
            y = _solve_full(where_matrix(usable, safe, identity_like(r)), c, adjoint)
            return y, jnp.full(r.shape[:-2], p), usable
        full = certificate.full_rank(safe, rcond) | ~ok
        y = _solve_full(where_matrix(full, safe, identity_like(r)), c, adjoint)

        def truncated():
            kept = _truncate(driver, safe, rcond)
            rank = jnp.where(full, p, kept.rank)
            return where_matrix(full, y, kept.solve(c, adjoint)), rank

        y, rank = lax.cond(full.all(), lambda: (y, jnp.full(full.shape, p)), truncated)
        return y, rank, jnp.ones_like(full)

    return native_batch(solve, 3, (True, False, False))


@cache
def decider(driver: str):
    """The derivatives' path: (R, rcond, ok) -> (kept, full, usable) with the same decisions."""

    def decide(r, rcond, ok):
        safe = where_matrix(ok, r, identity_like(r))
        if driver == "gels":
            usable = certificate.independent(safe)
            full = jnp.ones_like(ok)
            return *_whole(where_matrix(usable, safe, identity_like(r))), full, usable
        full = certificate.full_rank(safe, rcond) | ~ok
        whole = _whole(where_matrix(full, safe, identity_like(r)))

        def truncated():
            kept = _truncate(driver, safe, rcond)
            return jax.tree.map(partial(_pick, full), whole, kept)

        return *lax.cond(full.all(), lambda: whole, truncated), full, jnp.ones_like(full)

    batched = native_batch(decide, 3, (False,) * 8)

    def call(r, rcond, ok):
        *kept, full, usable = batched(r, rcond, ok)
        return Decision(Kept(*kept), full, usable)

    return call


def _pick(full: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(full.reshape(full.shape + (1,) * (a.ndim - full.ndim)), a, b)
