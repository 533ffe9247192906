"""The corrected seminormal equations: products with T instead of a factorisation of it, where that is safe.

With the Cholesky factor R of the Gram matrix of T D (`_reduce.cholesky`) the seminormal solution is
y = D R^-1 R^-H D T^H b. Its error is up to kappa^2 eps; each correction by the true residual (Bjorck
1987, "Stability analysis of the method of seminormal equations")

    r = b - T y,   d = R^-H D T^H r,   y += D R^-1 d

multiplies it by theta at most, since in the norm |R D^-1 y| the error is multiplied by
I - R^-H (D T^H T D) R^-1 = -R^-H E R^-1. Believed only where theta is at most 0.1 and what further
corrections could add, theta |d| / (1 - theta), is below the rounding error of any method.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import H, abs2, mm, varying
from .._reduce.cholesky import Gram

_CORRECTIONS = 4


def _norms(a: jax.Array) -> jax.Array:
    return jnp.sqrt(abs2(a).sum(-2))


def _corrected(gram: Gram, start: tuple, correct: Callable) -> tuple[tuple, jax.Array]:
    """`start` (the columns of the solution, and what goes with them), corrected until that adds nothing.

    `correct` makes of it the next one, the norm of the correction d and the size of what it is
    compared with. A column that is done stays as it is, whatever its neighbours need. Also returned:
    per column, whether it is as good as any method's.
    """
    theta = gram.contraction[..., None]
    eps = jnp.finfo(theta.dtype).eps

    def going(state):
        count, _, done = state
        return (count < _CORRECTIONS) & ~done.all()

    def step(state):
        count, now, done = state
        new, norm, size = correct(*now)
        now = jax.tree.map(lambda a, b: jnp.where(done[..., None, :], a, b), now, new)
        # NaN is done: its column stays NaN
        return count + 1, now, done | ~(theta * norm > 2 * eps * size)

    done = ~gram.accepted[..., None] & jnp.ones(start[0].shape[-1], bool)
    _, now, done = lax.while_loop(going, step, varying((0, start, done)))
    return now, done


def solve(t: jax.Array, gram: Gram, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X = T^+ b, the squared residual norms, and per column whether X is as good as any method's."""

    def descend(r):
        """R^-H D T^H r: the part of r in the range of T, in its orthonormal basis."""
        return mm(H(gram.inverse), H(mm(H(r), t)))

    c = descend(b)
    y = mm(gram.inverse, c)

    def correct(y, r):
        d = descend(r)
        delta = mm(gram.inverse, d)
        r = r - mm(t, delta)
        return (y + delta, r), _norms(d), _norms(c) + _norms(r)

    (y, r), done = _corrected(gram, (y, b - mm(t, y)), correct)
    return y, abs2(r).sum(-2), done


def solve_adjoint(t: jax.Array, gram: Gram, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X = T^+H b, the solution of T^H X = b of smallest norm, and whether it is as good as any method's."""

    def correct(x):
        d = mm(H(gram.inverse), b - H(mm(H(x), t)))
        x = x + mm(t, mm(gram.inverse, d))
        return (x,), _norms(d), _norms(x)

    x = mm(t, mm(gram.inverse, mm(H(gram.inverse), b)))
    (x,), done = _corrected(gram, (x,), correct)
    return x, done
