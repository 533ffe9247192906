"""Fast: solutions without a library's factorisation of the data, with a proof that they are as good.

`lanes` solves many small matrices at once, `seminormal` tall ones by products, `lu` a square one by
elimination. This module says which one is worth a try; `_values` asks it, and takes the careful path
where the proof fails.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._decompose import certificate, svd
from .._numerics import abs2, in_double, largest_entry, scaled, small, where_matrix
from .._operator import Operator
from .._platform import on_cpu
from .._reduce import cholesky
from .._scaling import Scales, scale_columns
from . import lanes, lu, seminormal

# R (*batch, p, p), Q^H b (*batch, p, k) and the squared norms (*batch, k) of the columns of (I - Q Q^H) b
Projected = tuple[jax.Array, jax.Array, jax.Array]


class Attempt(NamedTuple):
    """What the fast path found, and where it may be believed."""

    solution: jax.Array  # (*batch, p or m, k)
    residuals: jax.Array  # (*batch, k), squared norms; zero for the adjoint problem
    rank: jax.Array  # (*batch)
    condition: jax.Array  # (*batch) a bound of ||T|| ||T^+||
    usable: jax.Array  # (*batch) bool: where gels has an answer
    solved: jax.Array  # (*batch) bool: True also where T holds NaN or Inf, so that nothing is to be found
    decided: jax.Array  # (*rcond's batch) bool: whether it is proven that the driver has this rank; the same
    certain: bool  # known before the numbers are: solved and decided everywhere
    t_finite: jax.Array  # (*batch) bool
    b_finite: jax.Array  # (*batch, k) bool
    singular_values: Callable[[], jax.Array]  # () -> (*batch, p)
    # of the scaled T and b what `_reduce.project` finds, as good as Householder's where the flags (*batch)
    # are set (None: everywhere); for the adjoint problem R, b itself and zero
    reduced: Callable[[Scales, jax.Array], tuple[jax.Array | None, Projected]] | None = None


def attempt(driver: str, adjoint: bool, t: jax.Array, b: jax.Array, rcond: jax.Array) -> Attempt | None:
    """T^+ b, or T^+H b, or None where no fast path is likely to help.

    rcond may have more leading dimensions than T and b.
    """
    if small(t.shape, b.shape):
        # One so small is done by the library before many operations have started.
        if t.ndim == 2:
            return None
        return _by_lanes(driver, adjoint, t, b, rcond)
    if cholesky.worthwhile(t.shape, t.dtype):
        return _by_gram(driver, adjoint, t, b, rcond)
    if lu.worthwhile(t.shape):
        return _by_lu(driver, t, b, rcond)
    return None


def _nothing_truncated(driver: str, condition: jax.Array, t_finite: jax.Array, rcond: jax.Array) -> jax.Array:
    """Whether it is proven that the driver truncates nothing at rcond; True where T holds NaN or Inf."""
    proven = jnp.ones_like(t_finite) if driver == "gels" else certificate.full_rank(condition, rcond)
    return jnp.broadcast_to(proven | ~t_finite, rcond.shape)


def _in_range(t: jax.Array, b: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether squares of T's columns and b lose nothing, and where T and b are finite."""
    low, high = cholesky.range_of(t.shape[-2], squares.dtype)
    b_largest, b_finite = largest_entry(b, -2)
    b_in_range = (b_largest == 0) | ((b_largest > low**0.5) & (b_largest < high**0.5))
    in_range = cholesky.in_range(t.shape[-2], squares) & b_in_range.all(-1)
    return in_range, cholesky.finite(t, squares), b_finite


def _by_gram(driver: str, adjoint: bool, t: jax.Array, b: jax.Array, rcond: jax.Array) -> Attempt:
    factor = cholesky.factor(t, rows_apart=adjoint, explicit=False)
    in_range, t_finite, b_finite = _in_range(t, b, factor.squares)
    if adjoint:
        c = b
        x, _, done = seminormal.augmented(Operator(t), factor, None, b)
        rho = jnp.zeros(done.shape, factor.squares.dtype)
    else:
        x, c, rho, done = seminormal.least_squares(Operator(t), factor, b)
    right = factor.accepted & in_range & done.all(-1)

    def reduced(scales: Scales, _: jax.Array):
        down = scales.b_size[1]
        triangle = scaled(factor.triangle, scales.t_size[1])
        return right & factor.precise, (triangle, c * down[..., None, :].astype(c.dtype), rho * down * down)

    return Attempt(
        solution=x,
        residuals=rho,
        rank=jnp.full(t_finite.shape, t.shape[-1]),
        condition=factor.condition,
        usable=jnp.ones_like(t_finite),
        solved=right | ~t_finite,
        decided=_nothing_truncated(driver, factor.condition, t_finite, rcond),
        certain=False,
        t_finite=t_finite,
        b_finite=b_finite,
        singular_values=lambda: svd.values(cholesky.triangle(t, factor), driver),
        # Only in double precision is the Cholesky factor as good as that.
        reduced=reduced if in_double(t.shape, t.dtype) else None,
    )


def _by_lu(driver: str, t: jax.Array, b: jax.Array, rcond: jax.Array) -> Attempt:
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
        rank=jnp.full(t_finite.shape, t.shape[-1]),
        condition=inverse.condition,
        usable=jnp.ones_like(t_finite),
        solved=solved | ~t_finite,
        decided=_nothing_truncated(driver, inverse.condition, t_finite, rcond),
        certain=False,
        t_finite=t_finite,
        b_finite=b_finite,
        singular_values=lambda: svd.values(where_matrix(t_finite, t, jnp.zeros_like(t)), driver),
    )


def _by_lanes(driver: str, adjoint: bool, t: jax.Array, b: jax.Array, rcond: jax.Array) -> Attempt:
    spectrum = driver in ("gelsd", "gelss")
    if spectrum:
        # Thresholds alone may have a longer batch; what is truncated depends on them.
        t, b = (jnp.broadcast_to(a, (*rcond.shape, *a.shape[-2:])) for a in (t, b))
    batch = t.shape[:-2]
    size = math.prod(batch)
    flat_t, flat_b = (a.reshape(size, *a.shape[-2:]) for a in (t, b))
    # Inside one kernel R stays in the cache; elsewhere to write it would cost those that need nothing of it.
    keep = driver == "gelsy" and on_cpu()
    flat = lanes.solve(adjoint, flat_t, flat_b, rcond.reshape(size) if spectrum else None, keep)
    out, kept = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), flat)

    def reduced(scales: Scales, b: jax.Array):
        r = kept.r * (kept.t_size * scales.t_size[1][..., None])[..., None, :].astype(kept.r.dtype)
        if adjoint:
            return None, (r, b, kept.tail)
        # Of a column that is zero there is nothing to scale.
        to = kept.b_size * scales.b_size[1]
        return None, (r, scale_columns(kept.c, to, scales.b_finite), kept.tail * to * to)

    if spectrum:
        decided = jnp.ones_like(out.t_finite)
    else:
        decided = _nothing_truncated(driver, out.condition, out.t_finite, rcond)
    return Attempt(
        solution=out.solution,
        residuals=out.residuals,
        rank=out.rank,
        condition=out.condition,
        usable=certificate.independent(out.dependence),
        solved=jnp.ones_like(out.t_finite),
        decided=decided,
        certain=driver != "gelsy",
        t_finite=out.t_finite,
        b_finite=out.b_finite,
        singular_values=lambda: out.singular_values,
        reduced=reduced if keep else None,
    )
