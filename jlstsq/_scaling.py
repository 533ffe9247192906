"""Scaling by powers of two, and the NaN of bad input: exact, per matrix for T and per column for b."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._numerics import largest_entry, power_of_two, scale_by, scaled


class Scales(NamedTuple):
    """The powers of two that undo a scaling of T and b, and where they are finite."""

    t_size: tuple[jax.Array, jax.Array]  # (*batch) the scale and its inverse
    b_size: tuple[jax.Array, jax.Array]  # (*batch, k)
    t_finite: jax.Array  # (*batch) bool
    b_finite: jax.Array  # (*batch, k) bool


def scale(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, Scales]:
    """T per matrix and b per column with entries of order one, exactly; columns with NaN or Inf are zero.

    As LAPACK's drivers do near overflow and underflow.
    """
    t_largest, t_finite = largest_entry(t, (-2, -1))
    t_size = power_of_two(t_largest)
    b_size, b_finite = column_scales(b)
    b = scale_columns(b, b_size[1], b_finite)
    return scaled(t, t_size[1]), b, Scales(t_size, b_size, t_finite, b_finite)


def column_scales(b: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The scales of B's columns and their inverses, and where b is finite."""
    largest, finite = largest_entry(b, -2)
    return power_of_two(largest), finite


def scale_columns(b: jax.Array, down: jax.Array, finite: jax.Array) -> jax.Array:
    """B with entries of order one in every column, those with NaN or Inf zero."""
    return jnp.where(finite[..., None, :], b, 0) * down[..., None, :].astype(b.dtype)


def unscale(scales: Scales, x, rho, rank, s, good):
    """Undo the scaling; NaN where the data, the threshold or gels' rank test say so.

    Multiplying by NaN, where a select would do for the value, makes the gradient NaN as well.
    """
    nan = jnp.where(good[..., None] & scales.b_finite, 1, jnp.nan).astype(scales.t_size[0].dtype)
    up, down = jnp.broadcast_arrays(scales.b_size[0], scales.t_size[1][..., None])
    x = scale_by(x, up[..., None, :], down[..., None, :]) * nan[..., None, :].astype(x.dtype)
    if rho is not None:
        rho = rho * up * up * nan
    nan = jnp.where(scales.t_finite, 1, jnp.nan).astype(s.dtype)
    s = s * (scales.t_size[0] * nan)[..., None]
    return x, rho, jnp.where(scales.t_finite, rank, 0), s


def good(driver: str, scales: Scales, rcond: jax.Array, usable: jax.Array) -> jax.Array:
    return scales.t_finite & (usable if driver == "gels" else ~jnp.isnan(rcond))
