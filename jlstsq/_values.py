"""The value path: solution, squared residuals, rank and singular values, without Q.

First the fast path (`_fast`), which knows when it may be believed. Where it may not, for as much as one
matrix of a batch, the careful one: scale, reduce, decompose. The choice is one branch for the whole
batch, but each matrix that the fast path solved keeps that result: no answer depends on its neighbours.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp

from . import _fast as fast
from . import _lanes as lanes
from ._blocks import of_matrices
from ._decompose import solve_decided, solve_truncated
from ._numerics import cond, identity_like, mm, native_batch, pick, small, varying, where_matrix
from ._reduce import project, squared_residuals, triangle
from ._scaling import good, scale, unscale

Answer = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _careful(
    driver: str,
    wide: bool,
    t: jax.Array,
    rcond: jax.Array,
    b: jax.Array,
    reduced: Callable[..., tuple[jax.Array | None, fast.Projected]] | None = None,
    known: jax.Array | None = None,
) -> Answer:
    """Scale, reduce, decompose, apply. rcond may have more leading dimensions than T and b.

    Some may be `reduced` (`_fast.Attempt`). Singular values that are `known` need not be found.
    """
    t_scaled, b, scales = scale(t, b)
    down = scales.t_size[1]
    cut = None if driver == "gels" else rcond
    none = jnp.zeros((*b.shape[:-2], b.shape[-1]), scales.b_size[0].dtype)
    if fast.lu.worthwhile(t.shape) and driver in ("gelsd", "gelss"):
        # Of a square matrix that was refused the SVD is next; QR first is waste. Not so for gelsy, whose
        # pivots in noise would be others than those of R, which its derivative has.
        safe = where_matrix(scales.t_finite, t_scaled, identity_like(t_scaled))
        x, rank, s = solve_truncated(driver, False, safe, rcond, b)
        return unscale(scales, x, none, rank, s, good(driver, scales, rcond, scales.t_finite))

    def reduce():
        return (triangle(t, down, cut), b, none) if wide else project(t, b, down, cut)

    certified, finite = False, scales.t_finite
    if reduced is None:
        r, c, tail = reduce()
    else:
        right, mine = reduced(scales, b)
        certified = right is None

        def otherwise(right):
            return jax.tree.map(partial(pick, right), mine, reduce())

        if right is None:
            r, c, tail = mine
        else:
            r, c, tail = cond(right.all(), lambda: mine, partial(otherwise, right), t, b, down)
    if certified:
        r = where_matrix(finite, r, identity_like(r))
        y, rank, s = solve_truncated(driver, wide, r, rcond, c)
        usable = finite
    else:
        y, rank, usable, s = solve_decided(driver, wide, r, rcond, finite, c, known)
    if wide:
        # T y with R backward stable is as accurate as using Q (Paige 1973).
        x, rho = mm(t_scaled, y), jnp.broadcast_to(tail, (*rcond.shape, tail.shape[-1]))
    else:
        x, rho = y, squared_residuals(t_scaled, b, r, c, tail, y)
    return unscale(scales, x, rho, rank, s, good(driver, scales, rcond, usable))


def _values(driver: str, wide: bool, t: jax.Array, rcond: jax.Array, b: jax.Array) -> Answer:
    attempt = fast.attempt(driver, wide, t, b, rcond)
    if attempt is None:
        return _careful(driver, wide, t, rcond, b)
    careful = partial(_careful, driver, wide, t, rcond, b, attempt.reduced)
    gels = driver == "gels"
    proven = attempt.solved & attempt.decided

    real = attempt.residuals.dtype
    spectrum = driver in ("gelsd", "gelss")
    none = jnp.zeros((*attempt.t_finite.shape, t.shape[-1]), real)

    def singular_values() -> jax.Array:
        return jnp.where(attempt.t_finite[..., None], attempt.singular_values(), jnp.nan)

    def answer(s: jax.Array) -> Answer:
        exists = attempt.t_finite & (attempt.usable if gels else ~jnp.isnan(rcond))
        nan = jnp.where(exists[..., None] & attempt.b_finite, 1, jnp.nan).astype(real)
        x = attempt.solution * nan[..., None, :].astype(t.dtype)
        rho = attempt.residuals * nan
        rank = jnp.where(attempt.t_finite, attempt.rank, 0)
        return (
            jnp.broadcast_to(x, (*rcond.shape, *x.shape[-2:])),
            jnp.broadcast_to(rho, (*rcond.shape, rho.shape[-1])),
            jnp.broadcast_to(rank, rcond.shape),
            s,
        )

    def fast_answer() -> Answer:
        return answer(singular_values() if spectrum else none)

    def careful_answer() -> Answer:
        # They cost an SVD of their own, which is often of use for no matrix.
        some = attempt.solved.any()
        known = cond(some, singular_values, lambda: none, t, rcond, b) if spectrum else none
        x, rho, rank, s = answer(known)
        careful_x, careful_rho, careful_rank, careful_s = careful(attempt.solved)
        return (
            where_matrix(proven, x, careful_x),
            jnp.where(proven[..., None], rho, careful_rho),
            jnp.where(proven, rank, careful_rank),
            jnp.where(attempt.solved[..., None], s, careful_s),
        )

    if attempt.certain:
        return varying(fast_answer(), (t, rcond, b))
    # A single matrix has no neighbours: nothing of the attempt is kept, nor computed for it.
    return cond(proven.all(), fast_answer, careful_answer if rcond.ndim else careful, t, rcond, b)


def _in_blocks(driver: str, wide: bool, t: jax.Array, rcond: jax.Array, b: jax.Array) -> Answer:
    """The same; a hard matrix sends only its own block into the careful path."""
    solve = partial(_values, driver, wide)
    # Thresholds alone may have a longer batch.
    if rcond.shape != t.shape[:-2]:
        return solve(t, rcond, b)
    # Values in lanes are made in blocks of their own; larger ones around these are for what is hard.
    size = 4 * lanes.LANES if small(t.shape, b.shape) else None
    return of_matrices(solve, size)(t, rcond, b)


@cache
def values(driver: str, wide: bool):
    """(T, rcond, b) -> (x, residuals, rank, s) for T (*batch, m, p), the tall one of A and A^H.

    x = T^+ b, or T^+H b where A is wide. A user's vmap lands on the batch.
    """
    return native_batch(
        partial(_in_blocks, driver, wide),
        matrices=1,
        thresholds=1,
        columns_out=(True, True, False, False),
    )
