"""A square matrix by Gaussian elimination, with a proof that the result is as good as Householder's.

The least-squares solution of a nonsingular square A is A^-1 b, and P A = L U with partial pivoting costs
half of a QR factorisation. It is not backward stable for every A (Wilkinson 1961), so nothing is assumed:
the solution, corrected once by its residual (Skeel 1980), is believed where that is as small as

    |b - A x| <= eps (sum_j |a_j| |x_j| + |b|),   a_j the columns of A,

which columns and b changed by eps each make zero: the backward error of Householder QR, column by column.

X, what the computed factors make of A^-1, and I - A X, with its rounding and that of the factors, are
bounded from their images of random vectors (`_norms`): |A^-1| <= |X| / (1 - |I - A X|).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _library as library
from .._decompose import certificate
from .._norms import norm2_bound, norm_from_images, vectors
from .._numerics import abs2, cond, mm

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


def solve(a: jax.Array, b: jax.Array, squares: jax.Array) -> Inverse:
    """A^-1 b for A (*batch, n, n) and its squared column norms."""
    n, k, eps = a.shape[-1], b.shape[-1], float(jnp.finfo(a.dtype).eps)
    factors, permutation = library.lu(a)

    def by_factors(c):
        c = jnp.take_along_axis(c, permutation[..., None], -2)
        c = library.triangular_solve(factors, c, lower=True, unit_diagonal=True)
        return library.triangular_solve(factors, c)

    g = vectors(a)
    c = jnp.concatenate([b, g], axis=-1)
    y = by_factors(c)
    rest = c - mm(a, y)
    x = y[..., :k] + by_factors(rest[..., :k])

    norms = jnp.sqrt(squares)
    columns = norms[..., :, None]
    allowed = (columns * abs(x)).sum(-2) + jnp.sqrt(abs2(b).sum(-2))
    error = jnp.sqrt(abs2(b - mm(a, x)).sum(-2))

    inexact = norm_from_images(rest[..., k:])
    y = y[..., k:] / jnp.where(inexact < _INEXACT, 1 - inexact, 0)[..., None, None].astype(y.dtype)
    # Relative to the Frobenius norm of A, so that no power of a small number is lost.
    size = jnp.sqrt(squares.sum(-1))
    unit = size[..., None, None].astype(a.dtype)
    condition = norm_from_images(unit * y)
    if jnp.finfo(a.dtype).bits == 32:
        enough = certificate.full_rank(condition, jnp.full_like(condition, n * eps)).all()
        condition = cond(
            enough, lambda: condition, lambda: condition * jnp.minimum(1, norm2_bound(a / unit)), a
        )
    return Inverse(
        solution=x,
        stable=error <= eps * allowed,
        condition=condition,
        scaled=norm_from_images(columns.astype(y.dtype) * y),
    )
