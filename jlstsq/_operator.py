"""T times a small matrix and a power of two, as an operator: applied to few vectors, never formed.

In the precision of the vectors, which may be double for a T in single precision.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import H, mm, power_of_two, scaled, varying

# Columns from which XLA on CPU sums a product with the adjoint as well in the other order.
_FEW = 8
# Columns of small matrices of a batch.
_TINY = 4
# Rows at a time in another precision.
_ROWS = 2000


def adjoint_times(q: jax.Array, b: jax.Array) -> jax.Array:
    """Q^H b, for few columns as (b^H Q)^H: XLA on CPU then reads a tall Q row by row.

    For as many as Q has the transpose of b would be one more array of its size. Small matrices of a batch by
    sums: what a derivative makes of a product, Q times a matrix of few columns, may take ten times as long.
    """
    columns = q.shape[-1]
    if q.ndim > 2 and columns <= _TINY and 1 < b.shape[-1] <= _TINY:
        return jnp.stack([(q[..., i, None].conj() * b).sum(-2) for i in range(columns)], axis=-2)
    return mm(H(q), b) if columns < _FEW or b.shape[-1] >= columns else H(mm(H(b), q))


def _by_rows(q: jax.Array, b: jax.Array) -> bool:
    """Whether a product with q in another precision is made of some rows at a time."""
    return q.dtype != b.dtype and q.ndim == 2 and q.shape[-2] >= 2 * _ROWS


def _adjoint_times(q: jax.Array, b: jax.Array) -> jax.Array:
    """The same in the precision of b, which may be double for a q in single precision."""

    def whole(q, b):
        return adjoint_times(q.astype(b.dtype), b)

    if not _by_rows(q, b):
        return whole(q, b)
    rows = q.shape[0] // _ROWS * _ROWS
    blocks = q[:rows].reshape(-1, _ROWS, q.shape[-1]), b[:rows].reshape(-1, _ROWS, b.shape[-1])
    start = varying(jnp.zeros((q.shape[-1], b.shape[-1]), b.dtype), (q, b))
    total, _ = lax.scan(lambda total, block: (total + whole(*block), None), start, blocks)
    return total + whole(q[rows:], b[rows:])


def _times(q: jax.Array, z: jax.Array) -> jax.Array:
    """Q z in the precision of z, which may be double for a q in single precision."""

    def whole(q):
        return mm(q.astype(z.dtype), z)

    if not _by_rows(q, z):
        return whole(q)
    rows = q.shape[0] // _ROWS * _ROWS
    out = lax.map(whole, q[:rows].reshape(-1, _ROWS, q.shape[-1]))
    return jnp.concatenate([out.reshape(rows, z.shape[-1]), whole(q[rows:])])


Halves = tuple[jax.Array, jax.Array]


def halves(down: jax.Array) -> Halves:
    """Of a scale: one for before a product and one for after it, so that nothing overflows."""
    before, _ = power_of_two(jnp.sqrt(down))
    return before, down / before


class Operator(NamedTuple):
    """F = `down` T E."""

    t: jax.Array  # (*batch, m, n)
    halves: Halves | None = None  # (*batch) of `down`, a power of two; None: 1
    e: jax.Array | None = None  # (*batch, n, columns); None: the identity

    @property
    def columns(self) -> int:
        return (self.t if self.e is None else self.e).shape[-1]

    @property
    def down(self) -> jax.Array | None:
        return None if self.halves is None else self.halves[0] * self.halves[1]

    @property
    def scaled(self) -> jax.Array:
        """`down` T, formed."""
        return scaled(self.t, self.down)

    def zeros(self, b: jax.Array, rows: bool) -> jax.Array:
        """As many as F has rows (columns), for each column of b."""
        count = self.t.shape[-2] if rows else self.columns
        return jnp.zeros((*self.t.shape[:-2], count, b.shape[-1]), self.t.dtype)

    def _applied(self, product: Callable, z: jax.Array) -> jax.Array:
        """`product` of `down` T and z: the smaller ones are scaled, T or z and the result."""
        if self.halves is None:
            return product(self.t, z)
        if z.shape[-1] > self.t.shape[-1]:
            return product(self.scaled, z)
        before, after = self.halves
        return scaled(product(self.t, scaled(z, before)), after)

    def times(self, z: jax.Array) -> jax.Array:
        """F z."""
        return self._applied(_times, z if self.e is None else mm(self.e.astype(z.dtype), z))

    def adjoint_times(self, v: jax.Array) -> jax.Array:
        """F^H v."""
        z = self._applied(_adjoint_times, v)
        return z if self.e is None else mm(H(self.e).astype(z.dtype), z)
