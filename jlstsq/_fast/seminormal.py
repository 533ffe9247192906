"""The corrected seminormal equations: products with T instead of a factorisation of it, where that is safe.

With the Cholesky factor R of the Gram matrix of T D (`_reduce.cholesky`) the seminormal solution is
y = D R^-1 R^-H D T^H b. Its error is up to kappa^2 eps; each correction by the true residual (Bjorck
1987, "Stability analysis of the method of seminormal equations")

    r = b - T y,   d = R^-H D T^H r,   y += D R^-1 d

multiplies it by theta at most, since in the norm |R D^-1 y| the error is multiplied by
I - R^-H (D T^H T D) R^-1 = -R^-H E R^-1. Believed only where theta is at most 0.1 and what further
corrections could add, theta |d| / (1 - theta), is below the rounding error of any method.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import H, abs2, mm, varying
from .._reduce.cholesky import Gram

_CORRECTIONS = 4


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
    _, y, r, done = lax.while_loop(going, correct, varying((0, y, r, start)))
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
    _, x, done = lax.while_loop(going, correct, varying((0, x, start)))
    return x, done
