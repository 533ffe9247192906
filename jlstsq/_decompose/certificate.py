"""What can be said about the rank of R without looking for it: cheap, and a proof where it says yes.

`full_rank` proves that no driver truncates; `independent` is gels' test for columns that depend on
each other to working precision. Both take R^-1, which is at hand.
"""

import jax
import jax.numpy as jnp

from .._norms import frobenius, norm2_bound, norm2_by_sums
from .._numerics import abs2, largest

# Rounding in R^-1 is kappa(R) eps relative, at most about 1/max(m, n) where the certificate can fire
# at the default rcond; the margin covers it.
_MARGIN = 0.9
# Columns up to which any norm is sharp enough, and from which double precision has room for a loose one.
_FEW, _MANY = 8, 64


def condition(r: jax.Array, inverse: jax.Array) -> jax.Array:
    """An upper bound of ||R|| ||R^-1||: sharp where that is cheap, or where eps leaves no room."""
    p = r.shape[-1]
    if p <= _FEW:
        return norm2_by_sums(r) * norm2_by_sums(inverse)
    if p <= _MANY or jnp.finfo(r.dtype).bits == 32:
        return norm2_bound(r) * norm2_bound(inverse)
    return frobenius(r) * frobenius(inverse)


def full_rank(condition: jax.Array, rcond: jax.Array) -> jax.Array:
    """Whether ||R|| ||R^-1|| rcond < 1 is proven: no singular value is at most rcond times the largest.

    The incremental condition estimates lie between sigma_n and sigma_1, so gelsy truncates nothing
    either. Inf or NaN (a zero pivot) compares as False.
    """
    return condition * rcond < _MARGIN


def refuted(r: jax.Array, rcond: jax.Array) -> jax.Array:
    """Whether R^-1 need not be asked: ||R|| ||R^-1|| is at least the largest entry over the least pivot."""
    entry = largest(abs(r), (-2, -1))
    pivot = abs(jnp.diagonal(r, axis1=-2, axis2=-1)).min(-1, initial=jnp.inf)
    return rcond * entry >= _MARGIN * pivot


def dependence(r: jax.Array, inverse: jax.Array) -> jax.Array:
    """The column-scaled condition number max_k sum_j ||r_j|| |R^-1|_jk, r_j the columns of R.

    Invariant under column scaling, so a Vandermonde matrix passes and dependent columns do not (van
    der Sluis 1969; Higham, Accuracy and Stability, 2002, section 7.3).
    """
    column_norms = jnp.sqrt(abs2(r).sum(-2))
    return largest((column_norms[..., :, None] * abs(inverse)).sum(-2))


def independent(dependence: jax.Array) -> jax.Array:
    """Whether the columns of R are linearly independent to working precision."""
    return float(jnp.finfo(dependence.dtype).eps) * dependence < 0.25
