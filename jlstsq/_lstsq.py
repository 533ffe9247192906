"""The call: check, scale, reduce, decompose, apply; wide problems as the adjoint of tall ones."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _arguments as arguments
from . import _derivative as derivative
from ._decompose import decider, singular_values, solver, svd
from ._numerics import H, abs2, largest_entry, mm, power_of_two, scale_by, where_matrix
from ._reduce import orthonormal, project, triangle
from ._result import LstsqResult


@partial(jax.jit, static_argnames=("driver",))
def lstsq(A: Any, B: Any, rcond: Any = None, *, driver: str | None = None) -> LstsqResult:
    driver = arguments.check_driver(driver)
    A, B = arguments.check_array(A, "A"), arguments.check_array(B, "B")
    arguments.check_matrix(A)
    vector = arguments.is_vector(A, B)
    batch = arguments.check_right_hand_side(A.shape, B, vector)
    dtypes = arguments.common_dtypes(A, B)
    a, b = A.astype(dtypes.compute), B.astype(dtypes.compute)
    rcond = arguments.resolve_rcond(rcond, a.shape, dtypes.compute)

    *batch_a, m, n = a.shape
    batch_a = tuple(batch_a)
    b = b[..., None] if vector else b
    k = b.shape[-1]
    b, folded = arguments.fold(b, batch_a, batch)
    wide = m < n
    t = H(a) if wide else a
    x, rho, rank, s = _solve(driver, wide, t, b, rcond)

    x = arguments.unfold(x, batch_a, batch, folded, k).astype(dtypes.result)
    real = jnp.finfo(dtypes.result).dtype
    none = jnp.zeros((0,), real)
    if m > n:
        rho = arguments.unfold(rho, batch_a, batch, folded, k).astype(real)
    return LstsqResult(
        solution=x[..., 0] if vector else x,
        residuals=rho if m > n else none,
        rank=jnp.zeros((0,), int) if driver == "gels" else rank,
        singular_values=s.astype(real) if driver in ("gelsd", "gelss") else none,
    )


class _Scaled(NamedTuple):
    """T and b with entries of order one, and the powers of two that undo it."""

    t: jax.Array  # (*batch, m, p)
    b: jax.Array  # (*batch, rows, k); columns that held NaN or Inf are zero
    t_size: tuple[jax.Array, jax.Array]  # (*batch) the scale and its inverse
    b_size: tuple[jax.Array, jax.Array]  # (*batch, k)
    t_finite: jax.Array  # (*batch) bool
    b_finite: jax.Array  # (*batch, k) bool


def _scale(t: jax.Array, b: jax.Array) -> _Scaled:
    """Scale T per matrix and b per column, exactly, as LAPACK's drivers do near overflow and underflow."""
    t_largest, t_finite = largest_entry(t, (-2, -1))
    b_largest, b_finite = largest_entry(b, -2)
    t_size, b_size = power_of_two(t_largest), power_of_two(b_largest)
    return _Scaled(
        t * t_size[1][..., None, None].astype(t.dtype),
        jnp.where(b_finite[..., None, :], b, 0) * b_size[1][..., None, :].astype(b.dtype),
        t_size,
        b_size,
        t_finite,
        b_finite,
    )


def _unscale(scaled: _Scaled, x, rho, rank, s, good):
    """Undo the scaling; NaN where the data, the threshold or gels' rank test say so.

    Multiplying by NaN, where a select would do for the value, makes the gradient NaN as well.
    """
    nan = jnp.where(good[..., None] & scaled.b_finite, 1, jnp.nan).astype(scaled.t_size[0].dtype)
    up, down = jnp.broadcast_arrays(scaled.b_size[0], scaled.t_size[1][..., None])
    x = scale_by(x, up[..., None, :], down[..., None, :]) * nan[..., None, :].astype(x.dtype)
    if rho is not None:
        rho = rho * up * up * nan
    nan = jnp.where(scaled.t_finite, 1, jnp.nan).astype(s.dtype)
    s = s * (scaled.t_size[0] * nan)[..., None]
    return x, rho, jnp.where(scaled.t_finite, rank, 0), s


def _safe_triangle(scaled: _Scaled, r: jax.Array) -> jax.Array:
    """R, with zeros instead of what came of NaN and Inf: no SVD must see those."""
    return where_matrix(scaled.t_finite, r, jnp.zeros_like(r))


def _good(driver: str, scaled: _Scaled, rcond: jax.Array, usable: jax.Array) -> jax.Array:
    return scaled.t_finite & (usable if driver == "gels" else ~jnp.isnan(rcond))


def _values(driver: str, wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """Solution, squared residuals (None for wide), rank and singular values, without Q."""
    scaled = _scale(t, b)
    t, b = scaled.t, scaled.b
    if wide:
        r = triangle(t)
        y, rank, usable = solver(driver, True)(r, rcond, scaled.t_finite, b)
        # T y with R backward stable is as accurate as using Q (Paige 1973).
        x, rho = mm(t, y), None
    else:
        r, c, tail = project(t, b)
        x, rank, usable = solver(driver, False)(r, rcond, scaled.t_finite, c)
        rho = tail + abs2(c - mm(r, x)).sum(-2)
    s = singular_values(driver, _safe_triangle(scaled, r))
    return _unscale(scaled, x, rho, rank, s, _good(driver, scaled, rcond, usable))


def _differentiable(driver: str, wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """The same as `_values`, written so that JAX can differentiate it to any order."""
    scaled = _scale(t, b)
    t, b = scaled.t, scaled.b
    q, r = orthonormal(lax.stop_gradient(t))
    decision = decider(driver)(r, rcond, scaled.t_finite)
    factors = derivative.Factors(t, q, r, decision)
    x, rho = derivative.solve(driver, factors, b, adjoint=wide)
    u, s, v = svd.factors(_safe_triangle(scaled, r), driver)
    _, s, _ = derivative.singular_triplets(t, mm(q, u), s, v)
    good = _good(driver, scaled, rcond, decision.usable)
    return _unscale(scaled, x, rho, decision.kept.rank, s, good)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solve(driver: str, wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """T^+ b (tall) or T^+H b (wide) for T (*batch, m, p), b (*batch, m or p, k), rcond (*batch)."""
    return _values(driver, wide, t, b, rcond)


def _solve_rule(driver, wide, primals, tangents):
    """Differentiate the differentiable form, in the arguments that do move."""
    *tb, rcond = primals
    moving = [i for i in (0, 1) if not isinstance(tangents[i], jax.custom_derivatives.SymbolicZero)]

    def fun(*arguments):
        full = list(tb)
        for i, argument in zip(moving, arguments, strict=True):
            full[i] = argument
        return _differentiable(driver, wide, *full, lax.stop_gradient(rcond))

    return jax.jvp(fun, [tb[i] for i in moving], [tangents[i] for i in moving])


_solve.defjvp(_solve_rule, symbolic_zeros=True)
