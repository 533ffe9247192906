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

from .._numerics import abs2, varying
from .._operator import Operator
from .._reduce.cholesky import Gram

# theta^16 is below eps.
_CORRECTIONS = 16
# theta is at most 0.1, and rounding adds little.
_REFUTED = 0.3


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
        count, _, done, _ = state
        return (count < _CORRECTIONS) & ~done.all()

    def step(state):
        count, now, done, small = state
        new, norm, size = correct(*now)
        now = jax.tree.map(lambda a, b: jnp.where(done[..., None, :], a, b), now, new)
        # A correction that large refutes the bound. NaN is done: its column stays NaN.
        small = small & (done | ~(norm > _REFUTED * size))
        return count + 1, now, done | ~(theta * norm > eps / 2 * size), small

    done = jnp.broadcast_to(~gram.accepted[..., None], (*gram.accepted.shape, start[0].shape[-1]))
    start = varying((0, start, done, jnp.ones_like(done)))
    # Elsewhere than on CPU the test of a loop costs as much as a correction: the first is made in any case.
    start = lax.platform_dependent(start, cpu=lambda start: start, default=step)
    _, now, done, small = lax.while_loop(going, step, start)
    return now, done & small


def augmented(
    t: Operator, gram: Gram, f: jax.Array | None, g: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(v, y) with v + T y = f, T^H v = g, and per column whether they are as good as any method's.

    f or g None: zero. With g = 0 y is T^+ f and v its residual, with f = 0 v is T^+H g.
    """

    def rest(v):
        """R^-H D (T^H v - g): what is left of the second equation."""
        parts = [] if v is None else [t.adjoint_times(v, precise=True)]
        parts += [] if g is None else [-g]
        return gram.adjoint_solve(sum(parts[1:], parts[0]))

    c = rest(f)
    y = gram.solve(c)
    v = -t.times(y) if f is None else f - t.times(y)

    def correct(v, y):
        d = rest(v)
        delta = gram.solve(d)
        v = v - t.times(delta)
        return (v, y + delta), _norms(d), _norms(c) + _norms(v)

    (v, y), done = _corrected(gram, (v, y), correct)
    return v, y, done
