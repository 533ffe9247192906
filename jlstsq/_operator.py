"""T times a small matrix and a power of two, as an operator: applied to few vectors, never formed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import H, double_precision, in_double, mm, native_batch, power_of_two, varying

# Columns from which XLA on CPU sums a product with the adjoint as well in the other order.
_FEW = 8
# Rows at a time in double precision.
_ROWS = 2000


def adjoint_times(q: jax.Array, b: jax.Array) -> jax.Array:
    """Q^H b, for few columns as (b^H Q)^H: XLA on CPU then reads a tall Q row by row.

    For as many as Q has the transpose of b would be one more array of its size.
    """
    columns = q.shape[-1]
    return mm(H(q), b) if columns < _FEW or b.shape[-1] >= columns else H(mm(H(b), q))


def _precise(q: jax.Array, b: jax.Array) -> tuple[jax.Array]:
    if not in_double(q.shape, q.dtype):
        return (adjoint_times(q, b),)
    m = q.shape[-2]

    def double(q, b):
        with double_precision(q.dtype) as wide:

            def whole(q, b):
                return adjoint_times(q.astype(wide), b.astype(wide))

            if q.ndim > 2 or m < 2 * _ROWS:
                return whole(q, b).astype(q.dtype)
            rows = m // _ROWS * _ROWS
            blocks = q[:rows].reshape(-1, _ROWS, q.shape[-1]), b[:rows].reshape(-1, _ROWS, b.shape[-1])
            start = varying(jnp.zeros((q.shape[-1], b.shape[-1]), wide), (q, b))
            total, _ = lax.scan(lambda total, block: (total + whole(*block), None), start, blocks)
            return (total + whole(q[rows:], b[rows:])).astype(q.dtype)

    return (lax.platform_dependent(q, b, cpu=double, default=adjoint_times),)


# JAX would batch the double precision program later, where double precision is off (jax 0.10.2).
_batched = native_batch(_precise, 1, (True,))


def precise_adjoint_times(q: jax.Array, b: jax.Array) -> jax.Array:
    """Q^H b for a residual b, of which little is left: summed in double precision where `in_double`.

    Some rows at a time where there are many. Never differentiated.
    """
    (c,) = _batched(q, b)
    return c


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

    def adjoint_times(self, v: jax.Array, precise: bool = False) -> jax.Array:
        """F^H v; `precise` as in `precise_adjoint_times`."""
        product = precise_adjoint_times if precise else adjoint_times
        if self.down is None:
            z = product(self.t, v)
        else:
            before, after = self._halves(v)
            z = product(self.t, v * before) * after
        return z if self.e is None else mm(H(self.e), z)
