"""Reduce: the tall T = Q R, the only step that touches m x n data.

`triangle` gives R alone, `project` R and what a right-hand side needs of Q, `orthonormal` Q itself.
This module chooses how; today every path is Householder's.
"""

import jax

from . import householder


def project(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the squared norms of the columns of (I - Q Q^H) b."""
    # Each right-hand side that rides along in QR of [T, b] costs as much as a column of T;
    # beyond about p of them forming Q once is cheaper.
    if b.shape[-1] <= t.shape[-1]:
        return householder.reduce_augmented(t, b)
    return householder.reduce_apply(t, b)


triangle = householder.triangle
orthonormal = householder.orthonormal
