"""Upper bounds of norms.

From random vectors: for a fixed unit v and g with independent entries, uniform and of variance one, v^T g
has a density of at most 1 / sqrt(6) (Ball 1986: no slice of the unit cube is larger than sqrt(2)). For a
matrix B with the leading right singular vector v, |B g| >= |B| |v^T g|, so

    |B| <= f max_i |B g_i|   for r vectors, except with probability (2 / (f sqrt(6)))^r

(Dixon 1983; Halko, Martinsson and Tropp 2011, lemma 4.1, for normal ones). r and f are such that this is
below 1e-16, for a matrix that was not made to fit the vectors, which are always the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import H, abs2, hashed, largest, mm, real_dtype, varying

# r and f: float64 has room for a loose bound, float32 at the default rcond has none.
_VECTORS, _FACTOR = {64: 16, 32: 32}, {64: 8.2, 32: 2.6}
# Columns up to which a product with the adjoint is cheaper.
_FEW = 64


def frobenius(a: jax.Array) -> jax.Array:
    """||A||_F."""
    return jnp.sqrt(abs2(a).sum((-2, -1)))


def norm2_by_sums(a: jax.Array) -> jax.Array:
    """An upper bound of ||A||_2, at most sqrt(n) times it: ||A||_2^2 <= ||A||_1 ||A||_inf. No squares."""
    size = abs(a)
    return jnp.sqrt(largest(size.sum(-1))) * jnp.sqrt(largest(size.sum(-2)))


def random(rows: int, columns: int, dtype: Any) -> jax.Array:
    """Fixed numbers, as if independent, uniform and of variance one."""
    uniform = (hashed(rows * columns) >> 8).astype(real_dtype(dtype)) * 2.0**-23 - 1
    return (uniform * 3**0.5).reshape(rows, columns).astype(dtype)


def vectors(a: jax.Array) -> jax.Array:
    """The columns g_i (*batch, n, r) for a (*batch, m, n), the same for every A."""
    n, count = a.shape[-1], _VECTORS[jnp.finfo(a.dtype).bits]
    return varying(jnp.broadcast_to(random(n, count, a.dtype), (*a.shape[:-2], n, count)), a)


def norm_from_images(images: jax.Array) -> jax.Array:
    """A bound of ||B||_2 from B g_i."""
    # One of the real and the imaginary part of v has norm 1 / sqrt(2) at least.
    factor = _FACTOR[jnp.finfo(images.dtype).bits] * (2**0.5 if jnp.iscomplexobj(images) else 1)
    return factor * jnp.sqrt(largest(abs2(images).sum(-2)))


def norm2_bound(a: jax.Array) -> jax.Array:
    """An upper bound of ||A||_2: a root of one of ||(A^H A)^2||, or ^4, whose looseness it takes as well.

    A is scaled by a norm first, so that the powers stay in range.
    """
    few = a.shape[-1] <= _FEW
    size = abs(a).sum((-2, -1)) if few else frobenius(a)
    unit = a / jnp.where(size > 0, size, 1)[..., None, None].astype(a.dtype)
    if few:
        gram = mm(H(unit), unit)
        return size * frobenius(mm(gram, gram)) ** 0.25
    squared = _power(lambda z: mm(H(unit), mm(unit, z)), 4, vectors(a), a)
    return size * norm_from_images(squared) ** 0.125


def _power(times: Callable, steps: int, z: jax.Array, *data: Any) -> jax.Array:
    return lax.fori_loop(0, steps, lambda _, z: times(z), varying(z, *data))


def inverse_norm_bound(
    solve: Callable[[jax.Array], jax.Array], adjoint_solve: Callable, a: jax.Array, steps: int
) -> jax.Array:
    """An upper bound of ||A^-1||_2, A^-1 z and A^-H z given: a root of one of ||(A A^H)^-steps||.

    Of a only the size and the dtype count.
    """
    g = vectors(a)
    y = solve(g)
    size = jnp.sqrt(largest(abs2(y).sum(-2)))
    down = (1 / jnp.where(size > 0, size, 1)).astype(y.dtype)
    z = adjoint_solve(y * down) * down
    z = _power(lambda z: adjoint_solve(solve(z) * down) * down, steps - 1, z, y)
    return size * norm_from_images(z) ** (0.5 / steps)
