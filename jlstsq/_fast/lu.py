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
from jax import lax

from .. import _library as library
from .._decompose import certificate
from .._norms import norm2_bound, norm_from_images, vectors
from .._numerics import abs2, cond, inverse_permutation, largest, mm, varying

# A matrix this small is left to Householder's method.
_SMALLEST = 100
# Bound of |I - A X| that is believed.
_INEXACT = 0.5
# What a bound from images may be too large by (some three times the factor of `_norms`), and the power of X
# from which roots of it are sharp enough.
_LOOSE, _SHARP = 8.0, 9


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

    def adjoint_by_factors(c):
        c = library.triangular_solve(factors, c, adjoint=True)
        c = library.triangular_solve(factors, c, lower=True, unit_diagonal=True, adjoint=True)
        return jnp.take_along_axis(c, inverse_permutation(permutation)[..., None], -2)

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
    images = y[..., k:]
    exact = jnp.where(inexact < _INEXACT, 1 - inexact, 0)
    # Relative to the Frobenius norm of A, so that no power of a small number is lost.
    size = jnp.sqrt(squares.sum(-1))
    unit = size[..., None, None].astype(a.dtype)
    condition = norm_from_images(unit * images) / exact
    if jnp.finfo(a.dtype).bits == 32:
        # Single precision has no room for loose bounds: they are sharpened where that may decide.
        def full_rank(condition):
            return certificate.full_rank(condition, jnp.full_like(condition, n * eps)).all()

        def sharper():
            norm = jnp.minimum(1, norm2_bound(a / unit))
            up = jnp.sqrt(largest(abs2(images).sum(-2)))
            down = (1 / jnp.where(up > 0, up, 1))[..., None, None].astype(a.dtype)

            def may_decide(state):
                _, power, bound = state
                return ~full_rank(bound) & full_rank(bound / _LOOSE ** (1 / power)) & (power < _SHARP)

            def step(state):
                """From the images by X (X^H X)^i to those by one power more, i = (power - 1) / 2."""
                z, power, _ = state
                z, power = by_factors(adjoint_by_factors(z * down) * down), power + 2
                return z, power, norm * size * up * norm_from_images(z) ** (1 / power) / exact

            start = images * down, jnp.ones((), up.dtype), norm * condition
            return lax.while_loop(may_decide, step, varying(start, a))[-1]

        condition = cond(full_rank(condition), lambda: condition, sharper, a)
    columns = columns.astype(a.dtype)
    return Inverse(
        solution=x,
        stable=error <= eps * allowed,
        condition=condition,
        scaled=norm_from_images(columns * images) / exact,
    )
