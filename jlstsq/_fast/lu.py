"""A square matrix by Gaussian elimination, with a proof that the result is as good as Householder's.

The least-squares solution of a nonsingular square A is A^-1 b, and P A = L U with partial pivoting costs
half of a QR factorisation. It is not backward stable for every A (Wilkinson 1961), so nothing is assumed:
the solution, corrected once by its residual (Skeel 1980), is believed where that is as small as

    |b - A x| <= eps (sum_j |a_j| |x_j| + |b|),   a_j the columns of A,

which columns and b changed by eps each make zero: the backward error of Householder QR, column by column.

Bounds of norms come from random vectors. For a fixed unit v and g with independent entries, uniform and
of variance one, v^T g has a density of at most 1 / sqrt(6) (Ball 1986: no slice of the unit cube is larger
than sqrt(2)). For a matrix B with the leading right singular vector v, |B g| >= |B| |v^T g|, so

    |B| <= f max_i |B g_i|   for r vectors, except with probability (2 / (f sqrt(6)))^r

(Dixon 1983; Halko, Martinsson and Tropp 2011, lemma 4.1, for normal ones). r and f are such that this is
below 1e-16. X, what the computed factors make of A^-1, is bounded so; and I - A X, with its rounding and
that of the factors, from the residuals of the same solutions: |A^-1| <= |X| / (1 - |I - A X|).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _library as library
from .._decompose import certificate
from .._numerics import H, abs2, cond, hashed, mm, real_dtype, varying

# r and f: float64 has room for a loose bound, float32 at the default rcond has none.
_VECTORS, _FACTOR = {64: 16, 32: 32}, {64: 8.2, 32: 2.6}
# A matrix this small is left to Householder's method.
_SMALLEST = 100
# Bound of |I - A X| that is believed.
_INEXACT = 0.5


class Inverse(NamedTuple):
    """A^-1 b, and how large A^-1 is."""

    solution: jax.Array  # (*batch, n, k)
    stable: jax.Array  # (*batch, k) bool: the backward error is that of a stable method
    condition: jax.Array  # (*batch) a bound of ||A|| ||A^-1||; Inf or NaN where there is none
    scaled: jax.Array  # (*batch) a bound of ||D A^-1||, D the diagonal matrix of A's column norms


def worthwhile(shape: tuple) -> bool:
    """One square matrix, not a small one."""
    return len(shape) == 2 and isinstance(shape[0], int) and shape[0] == shape[1] >= _SMALLEST


def _vectors(n: int, dtype: Any) -> jax.Array:
    """The columns g_i, the same for every A."""
    count = _VECTORS[jnp.finfo(dtype).bits]
    uniform = (hashed(n * count) >> 8).astype(real_dtype(dtype)) * 2.0**-23 - 1
    return (uniform * 3**0.5).reshape(n, count).astype(dtype)


def _largest(a: jax.Array) -> jax.Array:
    """The bound of a norm from the images of the g_i."""
    # One of the real and the imaginary part of v has norm 1 / sqrt(2) at least.
    factor = _FACTOR[jnp.finfo(a.dtype).bits] * (2**0.5 if jnp.iscomplexobj(a) else 1)
    return factor * jnp.sqrt(abs2(a).sum(-2).max(-1))


def solve(a: jax.Array, b: jax.Array, squares: jax.Array) -> Inverse:
    """A^-1 b for A (*batch, n, n) and its squared column norms."""
    n, k, eps = a.shape[-1], b.shape[-1], float(jnp.finfo(a.dtype).eps)
    factors, permutation = library.lu(a)

    def by_factors(c):
        c = jnp.take_along_axis(c, permutation[..., None], -2)
        c = library.triangular_solve(factors, c, lower=True, unit_diagonal=True)
        return library.triangular_solve(factors, c)

    g = _vectors(n, a.dtype)
    g = varying(jnp.broadcast_to(g, (*a.shape[:-2], *g.shape)), a)
    c = jnp.concatenate([b, g], axis=-1)
    y = by_factors(c)
    rest = c - mm(a, y)
    x = y[..., :k] + by_factors(rest[..., :k])

    norms = jnp.sqrt(squares)
    columns = norms[..., :, None]
    allowed = (columns * abs(x)).sum(-2) + jnp.sqrt(abs2(b).sum(-2))
    error = jnp.sqrt(abs2(b - mm(a, x)).sum(-2))

    inexact = _largest(rest[..., k:])
    y = y[..., k:] / jnp.where(inexact < _INEXACT, 1 - inexact, 0)[..., None, None].astype(y.dtype)
    # Relative to the Frobenius norm of A, so that no power of a small number is lost.
    size = jnp.sqrt(squares.sum(-1))
    unit = size[..., None, None].astype(a.dtype)
    condition = _largest(unit * y)
    if jnp.finfo(a.dtype).bits == 32:
        enough = certificate.full_rank(condition, jnp.full_like(condition, n * eps)).all()
        condition = cond(enough, lambda: condition, lambda: condition * _norm(a / unit, g), a)
    return Inverse(
        solution=x,
        stable=error <= eps * allowed,
        condition=condition,
        scaled=_largest(columns.astype(y.dtype) * y),
    )


def _norm(a: jax.Array, g: jax.Array) -> jax.Array:
    """A bound of ||A||_2 for A of Frobenius norm one, sharper than that."""
    z = mm(H(a), mm(a, g))
    return jnp.minimum(1, jnp.sqrt(_largest(mm(H(a), mm(a, z)))) ** 0.5)
