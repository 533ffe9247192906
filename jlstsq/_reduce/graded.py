"""Householder QR for rows of very different size: T Pi = Q R with small errors in every row.

Rows sorted by size and columns pivoted make Householder's QR row-wise backward stable (Powell and
Reid 1969; Cox and Higham 1998). The pivots are those of R, found by a first reduction; the second one,
of the permuted columns, is the one that is kept. Pivoting R alone would be too late.
"""

import jax
import jax.numpy as jnp

from .._decompose.pivoted_qr import pivoted_qr
from .._numerics import flat, identity_like, largest_entry, where_matrix
from . import householder


def orthonormal(t: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Q (`flat`), R and the 0-based permutation with T[:, perm] = Q R. Elements that are not finite: any."""
    size, _ = largest_entry(t, -1)
    order = jnp.argsort(-size, axis=-1)
    t = jnp.take_along_axis(t, order[..., None], axis=-2)
    r = householder.triangle(t)
    _, _, perm = pivoted_qr(where_matrix(finite, r, identity_like(r)), r[..., :0])
    q, r = householder.orthonormal(jnp.take_along_axis(t, perm[..., None, :], axis=-1))
    return flat(jnp.take_along_axis(q, jnp.argsort(order, axis=-1)[..., None], axis=-2)), r, perm
