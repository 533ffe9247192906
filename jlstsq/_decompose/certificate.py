"""What can be said about the rank of R without looking for it: cheap, and a proof where it says yes.

`full_rank` proves that no driver truncates; `independent` is gels' test for columns that depend on
each other to working precision.
"""

import jax
import jax.numpy as jnp

from .._library import triangular_solve
from .._numerics import H, abs2, identity_like, mm

# Rounding in R^-1 is kappa(R) eps relative, at most about 1/max(m, n) where the certificate can fire
# at the default rcond; the margin covers it.
_MARGIN = 0.9


def _norm2_bound(a: jax.Array) -> jax.Array:
    """An upper bound of ||A||_2: ||(A^H A)^2||_F^(1/4), at most p^(1/8) too large.

    A is scaled by its Frobenius norm first, so that the powers stay in range.
    """
    frobenius = jnp.sqrt(abs2(a).sum((-2, -1)))
    unit = a / jnp.where(frobenius > 0, frobenius, 1)[..., None, None].astype(a.dtype)
    gram = mm(H(unit), unit)
    gram = mm(gram, gram)
    return frobenius * jnp.sqrt(jnp.sqrt(jnp.sqrt(abs2(gram).sum((-2, -1)))))


def full_rank(r: jax.Array, rcond: jax.Array) -> jax.Array:
    """Whether ||R||_2 ||R^-1||_2 rcond < 1 is proven: no singular value is at most rcond times the largest.

    The incremental condition estimates lie between sigma_n and sigma_1, so gelsy truncates nothing
    either. Inf or NaN (a zero pivot) compares as False.
    """
    inverse = triangular_solve(r, identity_like(r))
    return _norm2_bound(r) * (_norm2_bound(inverse) * rcond) < _MARGIN


def independent(r: jax.Array) -> jax.Array:
    """Whether the columns of R are linearly independent to working precision.

    The column-scaled condition number, eps * max_k sum_j ||r_j|| |R^-1|_jk < 1/4 with r_j the
    columns of R: invariant under column scaling, so a Vandermonde matrix passes and dependent
    columns do not (van der Sluis 1969; Higham, Accuracy and Stability, 2002, section 7.3).
    """
    eps = jnp.finfo(r.dtype).eps
    inverse = triangular_solve(r, identity_like(r))
    column_norms = jnp.sqrt(abs2(r).sum(-2))
    measure = (column_norms[..., :, None] * abs(inverse)).sum(-2).max(-1)
    return eps * measure < 0.25
