"""The Gram matrix, corrected: products with T instead of a factorisation of it, where that is safe.

G = T^H T, scaled to unit diagonal, has the Cholesky factor R with R^H R = D G D, and the seminormal
solution y = D R^-1 R^-H D T^H b. Its error is up to kappa^2 eps; each correction by the true
residual (Bjorck 1987, "Stability analysis of the method of seminormal equations")

    r = b - T y,   d = R^-H D T^H r,   y += D R^-1 d

multiplies it by theta at most. Proof: in the norm |R D^-1 y| the error is multiplied by
I - R^-H (D T^H T D) R^-1 = -R^-H E R^-1, where E, the error of the computed R^H R, is that of the
products, at most p gamma in norm (unit diagonal, gamma the growth of a sum of m terms), plus that of
Cholesky, p (p + 1) eps. So theta = |E| |R^-1|^2, and |R^-1| is bounded, not estimated.

Accepted only if theta is at most 0.1 and what further corrections could add, theta |d| / (1 - theta),
is below the rounding error of any method. The spectrum of R is then within 6 % of that of T D.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._library import cholesky, triangular_solve
from .._numerics import H, abs2, identity_like, mm, norm2_bound, where_matrix

_CONTRACTION = 0.1
_CORRECTIONS = 4
# Products sum in blocks of at most about this many terms, then over the blocks.
_BLOCK = 512


class Gram(NamedTuple):
    """The scaled Cholesky factor of T^H T."""

    inverse: jax.Array  # (*batch, p, p), D R^-1: (D R^-1)(D R^-1)^H = (T^H T)^-1
    triangle: jax.Array  # (*batch, p, p), R D^-1: its Gram matrix is that of T, to rounding
    contraction: jax.Array  # (*batch) theta
    condition: jax.Array  # (*batch) a bound of ||T|| ||T^+||
    accepted: jax.Array  # (*batch) bool: G is definite and theta small
    squares: jax.Array  # (*batch, p), of the column norms


def range_of(m: int, dtype: Any) -> tuple[float, float]:
    """Between which squares no term of a sum of m that counts is lost to underflow or overflow."""
    info = jnp.finfo(dtype)
    return float(4 * m * (info.tiny / info.eps)), float(info.max * info.eps)


def _rounding(m: int, p: int, dtype: Any) -> float:
    """A bound of the error of R^H R in norm, for unit columns: sums of m terms, then of p.

    Sums in blocks, and with the probabilistic bound min(n, 4 sqrt(n)) eps / 2 for the error of n
    operations (Higham and Mary 2019, SIAM J. Sci. Comput. 41).
    """
    operations = min(m, _BLOCK + m / _BLOCK) + 4 * (p + 1)
    return p * min(operations, 4 * operations**0.5) * float(jnp.finfo(dtype).eps) / 2


def product(t: jax.Array) -> jax.Array:
    """T^H T."""
    return mm(H(t), t)


def factor(t: jax.Array) -> Gram:
    """Cholesky of the Gram matrix of T (*batch, m, p)."""
    m, p = t.shape[-2:]
    g = product(t)
    squares = jnp.diagonal(g, axis1=-2, axis2=-1).real
    positive = ((squares > 0) & jnp.isfinite(squares)).all(-1)
    d = 1 / jnp.sqrt(jnp.where(positive[..., None], squares, 1))
    unit = g * d[..., :, None].astype(g.dtype) * d[..., None, :].astype(g.dtype)
    eye = identity_like(g)
    r = H(cholesky(where_matrix(positive, unit, eye)))
    definite = positive & jnp.isfinite(jnp.diagonal(r, axis1=-2, axis2=-1).real).all(-1)
    r = where_matrix(definite, r, eye)
    x = triangular_solve(r, eye)
    inverse_norm = norm2_bound(x)
    contraction = _rounding(m, p, squares.dtype) * inverse_norm**2
    accepted = definite & (contraction <= _CONTRACTION)
    inverse = d[..., :, None].astype(x.dtype) * x
    # ||T|| is at most its Frobenius norm, ||D R^-1|| at most its own and ||D|| ||R^-1||.
    size = jnp.sqrt(squares.sum(-1))
    inverse_size = jnp.minimum(d.max(-1) * inverse_norm, jnp.sqrt(abs2(inverse).sum((-2, -1))))
    return Gram(
        inverse=inverse,
        triangle=r / d[..., None, :].astype(r.dtype),
        contraction=contraction,
        condition=size * inverse_size,
        accepted=accepted,
        squares=squares,
    )


def triangle(t: jax.Array, gram: Gram) -> jax.Array:
    """R of T as stable as Householder's: Cholesky once more, of the nearly orthonormal T R^-1."""
    z = mm(t, gram.inverse)
    # The backward error of a product with R^-1 grows with its condition number; corrected once, it does not.
    z = z + mm(t - mm(z, gram.triangle), gram.inverse)
    return mm(H(cholesky(product(z))), gram.triangle)


def _norms(a: jax.Array) -> jax.Array:
    return jnp.sqrt(abs2(a).sum(-2))


def solve(t: jax.Array, gram: Gram, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X = T^+ b, the squared residual norms, and per column whether X is as good as any method's."""
    x_ = gram.inverse
    theta = gram.contraction[..., None]
    eps = jnp.finfo(theta.dtype).eps

    def descend(r):
        """R^-H D T^H r: the part of r in the range of T, in its orthonormal basis."""
        return mm(H(x_), H(mm(H(r), t)))

    c = descend(b)
    y = mm(x_, c)
    r = b - mm(t, y)

    def going(state):
        count, _, _, done = state
        return (count < _CORRECTIONS) & ~done.all()

    def correct(state):
        count, y, r, done = state
        d = descend(r)
        delta = mm(x_, d)
        keep = done[..., None, :]
        y, r = jnp.where(keep, y, y + delta), jnp.where(keep, r, r - mm(t, delta))
        size = _norms(c) + _norms(r)
        # NaN is done: its column stays NaN
        done = done | ~(theta * _norms(d) > 2 * eps * size)
        return count + 1, y, r, done

    start = ~gram.accepted[..., None] & jnp.ones(b.shape[-1], bool)
    _, y, r, done = lax.while_loop(going, correct, (0, y, r, start))
    return y, abs2(r).sum(-2), done


def solve_adjoint(t: jax.Array, gram: Gram, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X = T^+H b, the solution of T^H X = b of smallest norm, and whether it is as good as any method's."""
    x_ = gram.inverse
    theta = gram.contraction[..., None]
    eps = jnp.finfo(theta.dtype).eps
    d = mm(H(x_), b)
    x = mm(t, mm(x_, d))

    def going(state):
        count, _, done = state
        return (count < _CORRECTIONS) & ~done.all()

    def correct(state):
        count, x, done = state
        d = mm(H(x_), b - H(mm(H(x), t)))
        x = jnp.where(done[..., None, :], x, x + mm(t, mm(x_, d)))
        done = done | ~(theta * _norms(d) > 2 * eps * _norms(x))
        return count + 1, x, done

    start = ~gram.accepted[..., None] & jnp.ones(b.shape[-1], bool)
    _, x, done = lax.while_loop(going, correct, (0, x, start))
    return x, done
