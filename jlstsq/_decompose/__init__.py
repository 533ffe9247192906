"""Decompose: what of the triangle R is kept, and its pseudoinverse. The only place drivers differ.

gels keeps everything; gelsy truncates a pivoted QR (`complete_orthogonal`), gelsd and gelss the SVD
(`svd`). Where the certificate (`certificate`) proves that nothing is truncated, all four are R^-1.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _library as library
from .._blocks import in_blocks
from .._library import triangular_solve
from .._numerics import cond, identity_like, native_batch, pick, where_matrix
from . import certificate, complete_orthogonal, svd
from .kept import Kept

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")


class Decision(NamedTuple):
    """The kept part of each R of a batch, and where it is everything.

    The factors of the kept part lie in one array: where nothing is truncated they are passed on
    without being looked at, and XLA would bring each into the layout of its use.
    """

    factors: jax.Array  # (*batch, 5 p, p): e, r, u, l and w of `Kept`
    mask: jax.Array  # (*batch, p) bool, `kept` of `Kept`
    full: jax.Array  # (*batch) bool: nothing truncated, so `kept` is not used
    usable: jax.Array  # (*batch) bool: False where gels must answer NaN

    @property
    def rank(self) -> jax.Array:
        return self.mask.sum(-1)

    @property
    def kept(self) -> Kept:
        e, r, u, l, w = jnp.split(self.factors, 5, axis=-2)  # noqa: E741
        return Kept(e, r, u, l, w, self.mask)

    @classmethod
    def of(cls, kept: Kept, full: jax.Array, usable: jax.Array) -> "Decision":
        *factors, mask = kept
        return cls(jnp.concatenate(factors, axis=-2), mask, full, usable)


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
    """The derivatives' path: (R, rcond, ok, proven) -> (kept, full, usable) with the same decisions.

    Where `proven`, T is known to be of full rank.
    """

    def decide(r, rcond, ok, proven):
        safe, full, usable = _certify(driver, r, rcond, ok)
        full = full | proven
        whole = _whole(where_matrix(full & usable, safe, identity_like(r)))
        if driver == "gels":
            return tuple(Decision.of(whole, full, usable))

        def truncated():
            kept = _truncate(driver, safe, rcond)
            return Decision.of(jax.tree.map(partial(pick, full), whole, kept), full, usable)

        return tuple(cond(full.all(), lambda: Decision.of(whole, full, usable), truncated, r, rcond))

    batched = native_batch(partial(in_blocks, decide), 4, (False,) * 4)
    return lambda r, rcond, ok, proven: Decision(*batched(r, rcond, ok, proven))
