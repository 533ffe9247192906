"""The kept part of a triangle R, in the form that every truncating driver fills in."""

from typing import NamedTuple

import jax

from .._library import triangular_solve
from .._numerics import H, mm


class Kept(NamedTuple):
    """R_k = u l w^H, the kept part of R (p x p, leading batch dimensions).

    All arrays are p x p whatever the rank is; columns beyond it are zero in e, u and w, and the
    triangles r and l hold the identity there. The kept columns of R, R e = u r, span the range of
    R_k: e are pivot columns of the identity (gelsy) or the right singular vectors (gelsd, gelss).
    """

    e: jax.Array  # R e = u r
    r: jax.Array  # upper triangular (diagonal for the SVD)
    u: jax.Array  # orthonormal columns
    l: jax.Array  # lower triangular (diagonal for the SVD)  # noqa: E741
    w: jax.Array  # orthonormal columns: the row space of R_k
    kept: jax.Array  # (*batch, p) bool: the first `rank` are True

    @property
    def rank(self) -> jax.Array:
        return self.kept.sum(-1)

    def solve(self, c: jax.Array, adjoint: bool) -> jax.Array:
        """R_k^+ c = w l^-1 u^H c; adjoint: y with R y = R_k^+H c = u l^-H w^H c = R e r^-1 l^-H w^H c."""
        if adjoint:
            y = triangular_solve(self.l, mm(H(self.w), c), lower=True, adjoint=True)
            return mm(self.e, triangular_solve(self.r, y))
        return mm(self.w, triangular_solve(self.l, mm(H(self.u), c), lower=True))
