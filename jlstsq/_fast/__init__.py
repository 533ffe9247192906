"""Fast: solutions without a library's factorisation of the data, with a proof that they are as good.

`lanes` solves many small matrices at once, `seminormal` tall ones by products, `lu` a square one by
elimination. This module says which one is worth a try; `_values` asks it, and takes the careful path
where the proof fails. `reducer` is the same choice for the derivatives: factors, or the proof that the
Gram matrix is enough.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._blocks import in_blocks
from .._decompose import certificate, svd
from .._numerics import abs2, cond, identity_like, largest_entry, mm, native_batch, where_matrix
from .._reduce import cholesky, factors, lanes, orthonormal, scaled
from . import lu, seminormal


class Attempt(NamedTuple):
    """What the fast path found, and where it may be believed."""

    solution: jax.Array  # (*batch, p or m, k)
    residuals: jax.Array  # (*batch, k), squared norms; zero for the adjoint problem
    condition: jax.Array  # (*batch) a bound of ||T|| ||T^+||
    usable: jax.Array  # (*batch) bool: where gels has an answer
    solved: jax.Array  # (*batch) bool: True also where T holds NaN or Inf, so that nothing is to be found
    t_finite: jax.Array  # (*batch) bool
    b_finite: jax.Array  # (*batch, k) bool
    singular_values: Callable[[], jax.Array]  # () -> (*batch, p)


def attempt(driver: str, adjoint: bool, t: jax.Array, b: jax.Array) -> Attempt | None:
    """T^+ b, or T^+H b, or None where no fast path is likely to help."""
    if lanes.worthwhile(t.shape) and lanes.worthwhile(b.shape):
        return _by_lanes(driver, adjoint, t, b)
    if cholesky.worthwhile(t.shape, t.dtype):
        return _by_gram(driver, adjoint, t, b)
    if lu.worthwhile(t.shape):
        return _by_lu(driver, t, b)
    return None


def full_rank(attempt: Attempt, rcond: jax.Array) -> jax.Array:
    """Whether it is proven that no driver truncates at rcond; True where T holds NaN or Inf."""
    return certificate.full_rank(attempt.condition, rcond) | ~attempt.t_finite


def _in_range(t: jax.Array, b: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether squares of T's columns and b lose nothing, and where T and b are finite.

    Column norms that are not finite mean NaN, Inf or an overflow; to know which costs a pass over T.
    """
    low, high = cholesky.range_of(t.shape[-2], squares.dtype)
    b_largest, b_finite = largest_entry(b, -2)
    b_in_range = (b_largest == 0) | ((b_largest > low**0.5) & (b_largest < high**0.5))
    in_range = cholesky.in_range(t.shape[-2], squares) & b_in_range.all(-1)
    finite = jnp.isfinite(squares).all(-1)
    t_finite = cond(
        finite.all(), lambda: jnp.ones_like(finite), lambda: finite | largest_entry(t, (-2, -1))[1], t
    )
    return in_range, t_finite, b_finite


def _by_gram(driver: str, adjoint: bool, t: jax.Array, b: jax.Array) -> Attempt:
    factor = cholesky.factor(t, rows_apart=adjoint)
    in_range, t_finite, b_finite = _in_range(t, b, factor.squares)
    if adjoint:
        x, _, done = seminormal.augmented(t, factor, None, b)
        rho = jnp.zeros(done.shape, factor.squares.dtype)
    else:
        v, x, done = seminormal.augmented(t, factor, b, None)
        rho = abs2(v).sum(-2)
    return Attempt(
        solution=x,
        residuals=rho,
        condition=factor.condition,
        usable=jnp.ones_like(t_finite),
        solved=(factor.accepted & in_range & done.all(-1)) | ~t_finite,
        t_finite=t_finite,
        b_finite=b_finite,
        singular_values=lambda: svd.values(cholesky.triangle(t, factor), driver),
    )


def _by_lu(driver: str, t: jax.Array, b: jax.Array) -> Attempt:
    squares = abs2(t).sum(-2)
    in_range, t_finite, b_finite = _in_range(t, b, squares)
    inverse = lu.solve(t, b, squares)
    solved = in_range & (inverse.stable | ~b_finite).all(-1)
    if driver == "gels":
        # |R^-1| = |A^-1|, and a sum of p terms is at most p^(1/2) times their norm.
        solved = solved & certificate.independent(inverse.scaled * t.shape[-1] ** 0.5)
    return Attempt(
        solution=inverse.solution,
        residuals=jnp.zeros((*t.shape[:-2], b.shape[-1]), squares.dtype),
        condition=inverse.condition,
        usable=jnp.ones_like(t_finite),
        solved=solved | ~t_finite,
        t_finite=t_finite,
        b_finite=b_finite,
        singular_values=lambda: svd.values(where_matrix(t_finite, t, jnp.zeros_like(t)), driver),
    )


def _by_lanes(driver: str, adjoint: bool, t: jax.Array, b: jax.Array) -> Attempt:
    batch = t.shape[:-2]
    size = math.prod(batch)
    flat_t, flat_b = (a.reshape(size, *a.shape[-2:]) for a in (t, b))
    flat = lanes.solve(adjoint, driver in ("gelsd", "gelss"), flat_t, flat_b)
    out = lanes.Lanes(*(a.reshape(*batch, *a.shape[1:]) for a in flat))
    in_range, t_finite, b_finite = _in_range(t, b, out.squares)
    return Attempt(
        solution=out.solution,
        residuals=out.residuals,
        condition=out.condition,
        usable=certificate.independent(out.dependence),
        solved=(in_range & out.converged) | ~t_finite,
        t_finite=t_finite,
        b_finite=b_finite,
        singular_values=lambda: out.singular_values,
    )


class Reduced(NamedTuple):
    """T = Q R, or where `gram` is accepted T itself in the place of Q."""

    q: jax.Array  # (*batch, m, p)
    r: jax.Array  # (*batch, p, p)
    gram: cholesky.Gram | None  # accepted: enough for every right-hand side, and of full rank; or not finite


@cache
def reducer(driver: str, adjoint: bool) -> Callable[..., Reduced]:
    """(T, rcond, t_finite, down) -> `Reduced` of `down` T, a matrix of entries of order one."""

    def reduce(t, rcond, finite, down):
        t = scaled(t, down)
        if lanes.worthwhile(t.shape) or not cholesky.worthwhile(t.shape, t.dtype):
            return orthonormal(t)
        gram = cholesky.factor(t, rows_apart=adjoint)
        accepted = gram.accepted
        if driver != "gels":
            accepted = accepted & certificate.full_rank(gram.condition, rcond)
        # Where it is not accepted it is still computed with: nothing in it may overflow.
        accepted = accepted | ~finite
        harmless = (where_matrix(accepted, x, identity_like(x)) for x in (gram.inverse, gram.triangle))
        gram = gram._replace(inverse=next(harmless), triangle=next(harmless), accepted=accepted)

        def careful():
            q, r = factors(t)
            return where_matrix(gram.accepted, t, q), where_matrix(gram.accepted, gram.triangle, r)

        q, r = cond(gram.accepted.all(), lambda: (t, gram.triangle), careful, t)
        return q, r, *gram

    def call(t, rcond, finite, down):
        q, r, *gram = by_shape(t.shape, t.dtype)(t, rcond, finite, down)
        return Reduced(q, r, cholesky.Gram(*gram) if gram else None)

    def by_shape(shape, dtype):
        if lanes.worthwhile(shape):
            return native_batch(reduce, 4, (False,) * 2)
        outputs = 2 + cholesky.worthwhile(shape, dtype) * len(cholesky.Gram._fields)
        return native_batch(partial(in_blocks, reduce), 4, (False,) * outputs)

    return call


@cache
def triplets(driver: str) -> Callable:
    """(T, t_finite, reduced) -> U (*batch, m, p), s, V of T = U diag(s) V^H; zero where T is not finite."""

    def decompose(t, finite, q, r, *gram):
        r = where_matrix(finite, r, jnp.zeros_like(r))
        if not gram:
            u, s, v = svd.factors(r, driver)
            return mm(q, u), s, v
        known = cholesky.Gram(*gram)
        by_gram = known.accepted & finite
        r = where_matrix(by_gram, cholesky.triangle(t, known), r)
        u, s, v = svd.factors(r, driver)
        # T V = U diag(s): as orthonormal as the condition number, which is small here, allows
        inverse = jnp.where(by_gram[..., None], 1 / jnp.where(s > 0, s, 1), 0)
        direct = mm(t, v * inverse[..., None, :].astype(v.dtype))
        none = (~by_gram & finite).any()
        u = cond(none, lambda: where_matrix(by_gram, direct, mm(q, u)), lambda: direct, t, q)
        return where_matrix(finite, u, jnp.zeros_like(u)), s, v

    batched = native_batch(decompose, 4 + len(cholesky.Gram._fields), (False,) * 3)

    def call(t, finite, reduced):
        return batched(t, finite, reduced.q, reduced.r, *(reduced.gram or ()))

    return call
