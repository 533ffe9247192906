"""The value path: solution, squared residuals, rank and singular values, without Q.

First the fast path (`_fast`), which knows when it may be believed. Where it may not, for as much as one
matrix of a batch, the careful one: scale, reduce, decompose. The choice is one branch for the whole
batch, but each matrix that the fast path solved keeps that result: no answer depends on its neighbours.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from . import _fast as fast
from . import _lanes as lanes
from ._blocks import of_matrices
from ._decompose import solve_decided, svd
from ._numerics import abs2, cond, identity_like, mm, native_batch, varying, where_matrix
from ._reduce import project, triangle
from ._scaling import good, scale, unscale

Answer = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _squared_residuals(t, b, r, c, tail, y) -> jax.Array:
    """|b - T y|^2 by columns. From R, Q^H b and what T leaves of b where Q is known to be orthonormal.

    cuBLAS's batched QR does not rescale tiny columns as LAPACK does: where columns are repeated, Q is not
    orthonormal beyond the rank (0.003 in float32, 7e-11 in float64), and nor is what it leaves of b.
    """

    def by_triangle(t, b, r, c, tail, y):
        return tail + abs2(c - mm(r, y)).sum(-2)

    def by_products(t, b, r, c, tail, y):
        return abs2(b - mm(t, y)).sum(-2)

    data = t, b, r, c, tail, y
    if t.ndim == 2:
        return by_triangle(*data)
    return lax.platform_dependent(*data, cuda=by_products, default=by_triangle)


def _careful(
    driver: str,
    wide: bool,
    t: jax.Array,
    rcond: jax.Array,
    b: jax.Array,
    known: jax.Array | None = None,
) -> Answer:
    """Scale, reduce, decompose, apply. rcond may have more leading dimensions than T and b.

    Singular values that are `known` need not be found.
    """
    t_scaled, b, scales = scale(t, b)
    down = scales.t_size[1]
    cut = None if driver == "gels" else rcond
    none = jnp.zeros((*b.shape[:-2], b.shape[-1]), scales.b_size[0].dtype)
    if fast.lu.worthwhile(t.shape) and driver in ("gelsd", "gelss"):
        # Of a square matrix that was refused the SVD is next; QR first is waste. Not so for gelsy, whose
        # pivots in noise would be others than those of R, which its derivative has.
        safe = where_matrix(scales.t_finite, t_scaled, identity_like(t_scaled))
        x, rank, s = svd.solve(safe, rcond, driver, b, adjoint=False)
        return unscale(scales, x, none, rank, s, good(driver, scales, rcond, scales.t_finite))
    if wide:
        r, c, tail = triangle(t, down, cut), b, none
    else:
        r, c, tail = project(t, b, down, cut)
    y, rank, usable, s = solve_decided(driver, wide, r, rcond, scales.t_finite, c, known)
    if wide:
        # T y with R backward stable is as accurate as using Q (Paige 1973).
        x, rho = mm(t_scaled, y), jnp.broadcast_to(tail, (*rcond.shape, tail.shape[-1]))
    else:
        x, rho = y, _squared_residuals(t_scaled, b, r, c, tail, y)
    return unscale(scales, x, rho, rank, s, good(driver, scales, rcond, usable))


def _values(driver: str, wide: bool, t: jax.Array, rcond: jax.Array, b: jax.Array) -> Answer:
    careful = partial(_careful, driver, wide, t, rcond, b)
    attempt = fast.attempt(driver, wide, t, b, rcond)
    if attempt is None:
        return careful()
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
    in_lanes = lanes.worthwhile(t.shape, b.shape)
    in_blocks = of_matrices(solve, 4 * lanes.LANES) if in_lanes else of_matrices(solve)
    return in_blocks(t, rcond, b)


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
