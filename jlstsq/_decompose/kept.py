"""The kept part of a triangle R, in the form that every truncating driver fills in."""

from typing import NamedTuple

import jax


class Kept(NamedTuple):
    """R_k = u l w^H, the kept part of R (p x p, leading batch dimensions).

    All arrays are p x p whatever the rank is; columns beyond it are zero in e, u and w, and the
    triangles r and l hold the identity there. The kept columns of R, R e = u r, span the range of
    R_k: e are pivot columns of the identity (gelsy) or the right singular vectors (gelsd, gelss).
    """

    e: jax.Array  # R e = u r
    r: jax.Array  # upper triangular (diagonal for the SVD)
    u: jax.Array  # orthonormal columns
    l: jax.Array  # upper triangular (diagonal for the SVD)  # noqa: E741
    w: jax.Array  # orthonormal columns: the row space of R_k
    kept: jax.Array  # (*batch, p) bool: the first `rank` are True

    @property
    def rank(self) -> jax.Array:
        return self.kept.sum(-1)
