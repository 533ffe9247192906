"""T times a small matrix and a power of two, as an operator: applied to few vectors, never formed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._numerics import H, mm, power_of_two

# Columns from which XLA on CPU sums a product with the adjoint as well in the other order.
_FEW = 8


def adjoint_times(q: jax.Array, b: jax.Array) -> jax.Array:
    """Q^H b, for few columns as (b^H Q)^H: XLA on CPU then reads a tall Q row by row.

    For as many as Q has the transpose of b would be one more array of its size.
    """
    columns = q.shape[-1]
    return mm(H(q), b) if columns < _FEW or b.shape[-1] >= columns else H(mm(H(b), q))


class Operator(NamedTuple):
    """F = `down` T E."""

    t: jax.Array  # (*batch, m, n)
    down: jax.Array | None = None  # (*batch) a power of two; None: 1
    e: jax.Array | None = None  # (*batch, n, columns); None: the identity

    @property
    def columns(self) -> int:
        return (self.t if self.e is None else self.e).shape[-1]

    def zeros(self, b: jax.Array, rows: bool) -> jax.Array:
        """As many as F has rows (columns), for each column of b."""
        count = self.t.shape[-2] if rows else self.columns
        return jnp.zeros((*self.t.shape[:-2], count, b.shape[-1]), self.t.dtype)

    def _halves(self, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the scale: one for before a product and one for after it, so that nothing overflows."""
        assert self.down is not None
        before, _ = power_of_two(jnp.sqrt(self.down))
        after = self.down / before
        return before[..., None, None].astype(a.dtype), after[..., None, None].astype(a.dtype)

    def times(self, z: jax.Array) -> jax.Array:
        """F z."""
        z = z if self.e is None else mm(self.e, z)
        if self.down is None:
            return mm(self.t, z)
        before, after = self._halves(z)
        return mm(self.t, z * before) * after

    def adjoint_times(self, v: jax.Array) -> jax.Array:
        """F^H v."""
        if self.down is None:
            z = adjoint_times(self.t, v)
        else:
            before, after = self._halves(v)
            z = adjoint_times(self.t, v * before) * after
        return z if self.e is None else mm(H(self.e), z)
