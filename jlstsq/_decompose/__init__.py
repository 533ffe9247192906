"""Decompose: what of the triangle R is kept, and its pseudoinverse. The only place drivers differ.

gels keeps everything; gelsy truncates a pivoted QR (`complete_orthogonal`), gelsd and gelss the SVD
(`svd`). Where the certificate (`certificate`) proves that nothing is truncated, all four are R^-1.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _library as library
from .._blocks import of_matrices
from .._library import triangular_solve
from .._numerics import cond, identity_like, mm, native_batch, pick, transposed, where_matrix
from . import certificate, complete_orthogonal, svd
from .kept import Kept

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")


class Cut(NamedTuple):
    """The rank decision on each R of a batch, that together with R tells the kept part (`expand`).

    A derivative keeps it, and where nothing is truncated to fill large arrays would be most of the work.
    So R itself becomes diag(s) V^H (gelsd, gelss), or the pivoted triangle with its columns in place
    (gelsy), where something is truncated, and Q what goes with it.
    """

    pivots: jax.Array | None  # (*batch, p) int32, of gelsy
    mask: jax.Array  # (*batch, p) bool: the first `rank` are True
    full: jax.Array  # (*batch) bool: nothing truncated
    usable: jax.Array  # (*batch) bool: False where gels must answer NaN

    @property
    def rank(self) -> jax.Array:
        return self.mask.sum(-1)

    def regular(self, r: jax.Array) -> jax.Array:
        """R where nothing is truncated, elsewhere the identity."""
        return where_matrix(self.full & self.usable, r, identity_like(r))


class Decision(NamedTuple):
    """The kept part of each R of a batch, and where it is everything."""

    kept: Kept
    full: jax.Array  # (*batch) bool: nothing truncated, so `kept` is not used
    usable: jax.Array  # (*batch) bool: False where gels must answer NaN

    @property
    def rank(self) -> jax.Array:
        return self.kept.rank


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


def solve_truncated(
    driver: str, adjoint: bool, r: jax.Array, rcond: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By the driver's own decomposition of R: y as in `solve_decided`, the rank and the singular values."""
    if driver == "gelsy":
        y, rank = complete_orthogonal.solve(r, rcond, c, adjoint)
        return y, rank, jnp.zeros(r.shape[:-1], rcond.dtype)
    return svd.solve(r, rcond, driver, c, adjoint)


def solve_decided(
    driver: str,
    adjoint: bool,
    r: jax.Array,
    rcond: jax.Array,
    ok: jax.Array,
    c: jax.Array,
    known: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The values' path: y, the rank, where it is usable and the singular values, by one branch for a batch.

    y = T^+ b for c = Q^H b; for the adjoint problem y has T y = T^+H c. Where ok is False, R holds
    NaN or Inf and nothing is decided. rcond may have more leading dimensions than the others, and so have
    the results then, but for the singular values (zero, where the driver has none). The branch depends on
    the whole batch, so it keeps the fast result of every element that was certified: no answer depends on
    its neighbours. Of elements that are `known` the singular values are not needed.
    """
    p = r.shape[-1]
    safe, full, usable = _certify(driver, r, rcond, ok)
    r, c = (jnp.broadcast_to(a, (*rcond.shape, *a.shape[-2:])) for a in (safe, c))
    y = _solve_full(where_matrix(full & usable, r, identity_like(r)), c, adjoint)
    rank = jnp.full(full.shape, p)
    s = jnp.zeros(safe.shape[:-1], rcond.dtype)
    if driver == "gels":
        return y, rank, usable, s

    def whole():
        return y, rank, s if driver == "gelsy" else svd.values(safe, driver)

    def truncated():
        kept, rank, values = solve_truncated(driver, adjoint, r, rcond, c)
        if driver == "gelsy":
            values = s
        else:
            # A neighbour's truncation must not change them in the last digit.
            if rcond.shape != ok.shape:
                values = svd.values(safe, driver)
            elif rcond.ndim:
                alone = full if known is None else full & ~known
                values = cond(
                    alone.any(),
                    lambda: jnp.where(full[..., None], svd.values(safe, driver), values),
                    lambda: values,
                    r,
                    rcond,
                    c,
                )
        return where_matrix(full, y, kept), jnp.where(full, p, rank), values

    y, rank, s = cond(full.all(), whole, truncated, r, rcond, c)
    return y, rank, usable, s


def _certify(driver: str, r: jax.Array, rcond: jax.Array, ok: jax.Array):
    """R without NaN and Inf, where nothing is truncated, and where gels has an answer."""
    safe = where_matrix(ok, r, identity_like(r))
    everywhere = jnp.ones(jnp.broadcast_shapes(ok.shape, rcond.shape), bool)
    if driver == "gels":
        return safe, everywhere, certificate.independent(certificate.dependence(safe, library.inverse(safe)))

    def found():
        condition = certificate.condition(safe, library.inverse(safe))
        return jnp.broadcast_to(certificate.full_rank(condition, rcond), everywhere.shape)

    hopeless = (certificate.refuted(safe, rcond) | ~ok).all()
    return safe, cond(hopeless, lambda: ~everywhere, found, r, rcond) | ~ok, everywhere


def uncut(driver: str, r: jax.Array) -> Cut:
    """The decision that keeps everything."""
    mask = jnp.ones(r.shape[:-1], bool)
    index = jnp.broadcast_to(jnp.arange(r.shape[-1], dtype=jnp.int32), mask.shape)
    return Cut(index if driver == "gelsy" else None, mask, full=mask[..., 0], usable=mask[..., 0])


def cut(
    driver: str,
    adjoint: bool,
    q: jax.Array | None,
    r: jax.Array,
    rcond: jax.Array,
    ok: jax.Array,
    proven: jax.Array,
    c: jax.Array,
) -> tuple[jax.Array | None, jax.Array, Cut, jax.Array]:
    """Q (`flat`, if there is one), R without NaN and Inf, and the derivatives' decision, that of the values.

    And y as in `solve_decided`. Where `proven`, T is known to be of full rank. One branch for the batch.
    """
    safe, full, usable = _certify(driver, r, rcond, ok)
    full, usable = full | proven, usable | proven
    whole = uncut(driver, r)._replace(full=full, usable=usable)
    y = _solve_full(whole.regular(safe), c, adjoint)
    if driver == "gels":
        return q, safe, whole, y

    def truncated():
        pivots = None
        if driver == "gelsy":
            u, rotated, y_k, kept, pivots = complete_orthogonal.decide(safe, rcond, c, adjoint, q is not None)
            pivots = pivots.astype(jnp.int32)
        else:
            u, rotated, y_k, kept = svd.decide(safe, rcond, driver, c, adjoint, q is not None)
        # Elements of full rank are turned by the identity: to pick would take one more array of Q's size.
        turned = None
        if q is not None and u is not None:
            turned = mm(where_matrix(full, identity_like(u), u).mT, transposed(q, r)).reshape(q.shape)
        decision = Cut(pivots, kept | full[..., None], full, usable)
        return turned, where_matrix(full, safe, rotated), decision, where_matrix(full, y, y_k)

    return cond(full.all(), lambda: (q, safe, whole, y), truncated, q, r, rcond, c)


def expand(r: jax.Array, cut: Cut) -> Decision:
    """The decision with the factors of the kept part. Elements of full rank: R = I R I^H."""
    full = cut.full
    whole = _whole(cut.regular(r))
    if cut.pivots is not None:
        kept = complete_orthogonal.rebuild(r, cut.pivots, cut.mask)
    else:
        kept = svd.rebuild(r, cut.mask)
    return Decision(jax.tree.map(partial(pick, full), whole, kept), full, cut.usable)


@cache
def decider(driver: str):
    """(R, rcond, ok) -> `Decision`, for what keeps it."""

    def decide(r, rcond, ok):
        safe, full, usable = _certify(driver, r, rcond, ok)
        whole = _whole(where_matrix(full & usable, safe, identity_like(r)))
        if driver == "gels":
            return *whole, full, usable

        def truncated():
            return jax.tree.map(partial(pick, full), whole, _truncate(driver, safe, rcond))

        return *cond(full.all(), lambda: whole, truncated, r, rcond), full, usable

    batched = native_batch(of_matrices(decide), 3, (False,) * 8)

    def call(r, rcond, ok):
        *kept, full, usable = batched(r, rcond, ok)
        return Decision(Kept(*kept), full, usable)

    return call
