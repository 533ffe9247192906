"""Decompose: what of the triangle R is kept, and its pseudoinverse. The only place drivers differ.

gels keeps everything; gelsy truncates a pivoted QR (`complete_orthogonal`), gelsd and gelss the SVD
(`svd`). Where the certificate (`certificate`) proves that nothing is truncated, all four are R^-1.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _library as library
from .._library import triangular_solve
from .._numerics import cond, identity_like, native_batch, where_matrix
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


def solve_decided(
    driver: str, adjoint: bool, r: jax.Array, rcond: jax.Array, ok: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values' path: y, the rank and where it is usable, with one branch for a whole batch.

    y = T^+ b for c = Q^H b; for the adjoint problem y has T y = T^+H c. Where ok is False, R holds
    NaN or Inf and nothing is decided. The branch depends on the whole batch, so it keeps the fast
    result of every element that was certified: no answer depends on its neighbours.
    """
    p = r.shape[-1]
    safe, full, usable = _certify(driver, r, rcond, ok)
    y = _solve_full(where_matrix(full & usable, safe, identity_like(r)), c, adjoint)
    rank = jnp.full(full.shape, p)
    if driver == "gels":
        return y, rank, usable

    def truncated():
        kept = _truncate(driver, safe, rcond)
        return where_matrix(full, y, kept.solve(c, adjoint)), jnp.where(full, p, kept.rank)

    y, rank = cond(full.all(), lambda: (y, rank), truncated, r, rcond, c)
    return y, rank, usable


def _certify(driver: str, r: jax.Array, rcond: jax.Array, ok: jax.Array):
    """R without NaN and Inf, where nothing is truncated, and where gels has an answer."""
    safe = where_matrix(ok, r, identity_like(r))
    inverse = library.inverse(safe)
    everywhere = jnp.ones(jnp.broadcast_shapes(ok.shape, rcond.shape), bool)
    if driver == "gels":
        return safe, everywhere, certificate.independent(certificate.dependence(safe, inverse))
    return safe, certificate.full_rank(certificate.condition(safe, inverse), rcond) | ~ok, everywhere


@cache
def decider(driver: str):
    """The derivatives' path: (R, rcond, ok) -> (kept, full, usable) with the same decisions."""

    def decide(r, rcond, ok):
        safe, full, usable = _certify(driver, r, rcond, ok)
        whole = _whole(where_matrix(full & usable, safe, identity_like(r)))
        if driver == "gels":
            return *whole, full, usable

        def truncated():
            kept = _truncate(driver, safe, rcond)
            return jax.tree.map(partial(_pick, full), whole, kept)

        return *cond(full.all(), lambda: whole, truncated, r, rcond), full, usable

    batched = native_batch(decide, 3, (False,) * 8)

    def call(r, rcond, ok):
        *kept, full, usable = batched(r, rcond, ok)
        return Decision(Kept(*kept), full, usable)

    return call


def _pick(full: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(full.reshape(full.shape + (1,) * (a.ndim - full.ndim)), a, b)
