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

from .._numerics import abs2, cond_on_cpu, double_precision, in_double, native_batch, real_dtype, varying
from .._operator import Operator
from .._platform import platform_dependent
from .._reduce.cholesky import Gram

# theta^16 is below eps.
_CORRECTIONS = 16
# theta is at most 0.1, and rounding adds little.
_REFUTED = 0.3


def _norms(a: jax.Array) -> jax.Array:
    return jnp.sqrt(abs2(a).sum(-2))


def _corrected(
    t: Operator, gram: Gram, f: jax.Array | None, g: jax.Array | None, last: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """`_solve`, in double precision where the Gram matrix was.

    Rounding y to single precision, and the product with it, are as large as kappa eps of the right-hand
    side: corrections would go after that for ever.
    """
    dtype = t.t.dtype
    if gram.triangle_low is None and gram.inverse_low is None:
        return _solve(t, gram, f, g, last)
    matrices, structure = jax.tree.flatten((t, gram))
    sides, positions = jax.tree.flatten((f, g))

    def solve(*args):
        t, gram = jax.tree.unflatten(structure, args[: len(matrices)])
        f, g = jax.tree.unflatten(positions, args[len(matrices) :])

        def single(*_):
            return _solve(t, gram, f, g, last)

        def double(*_):
            with double_precision(dtype) as wide:
                f_wide, g_wide = jax.tree.map(lambda a: a.astype(wide), (f, g))
                (*found, rho), done = _solve(t, gram.as_computed(wide), f_wide, g_wide, last)
                return (*(a.astype(dtype) for a in found), rho.astype(real_dtype(dtype))), done

        if in_double(t.t.shape, dtype):
            found, done = platform_dependent(*args, cpu=double, default=single)
        else:
            found, done = single()
        return *found, done

    # One matrix and a batch of them are not in the same precision. And JAX would batch the double precision
    # program later, where double precision is off (jax 0.10.2).
    *found, done = native_batch(solve, len(matrices), (True,) * 5)(*matrices, *sides)
    return tuple(found), done


def _solve(
    t: Operator, gram: Gram, f: jax.Array | None, g: jax.Array | None, last: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """v, y with v + T y = f, T^H v = g, R D^-1 y, |v|^2 by columns; whether they are as good as any method's.

    y is corrected until that adds nothing. A column that is done stays as it is, whatever its neighbours
    need. The product that the `last` correction takes from v is not needed for |v|^2: with Q = T D R^-1
    nearly orthonormal |v - Q d|^2 = |v|^2 - |d|^2. Where v itself is not asked for it is left out, and
    the error of |v|^2 is to be below rounding as well.
    """

    def rest(v):
        """R^-H D (T^H v - g): what is left of the second equation."""
        parts = [] if v is None else [t.adjoint_times(v)]
        parts += [] if g is None else [-g]
        return gram.adjoint_solve(sum(parts[1:], parts[0]))

    def start(f):
        """The same for v = f. A derivative's f is most often zero: to look costs less than the product."""
        if f is None or g is None:
            return rest(f)
        return cond_on_cpu((f != 0).any(), lambda: rest(f), lambda: rest(None), f, g)

    sides = [a for a in (f, g) if a is not None]
    theta = gram.contraction[..., None].astype(real_dtype(sides[0].dtype))
    eps = float(jnp.finfo(t.t.dtype).eps)
    c = start(f)
    size = _norms(c)

    def going(state):
        count, _, done, _ = state
        return (count < _CORRECTIONS) & ~done.all()

    def step(state):
        count, (v, y, total, delta, before), done, small = state
        v = v if last else v - t.times(delta)
        # A column that is done is corrected by zero: to pick columns of v would be one more pass over it.
        d = jnp.where(done[..., None, :], 0, rest(v))
        delta = gram.solve(d)
        norm = _norms(d)
        v = v - t.times(delta) if last else v
        rho = abs2(v).sum(-2)
        rho = rho if last else jnp.maximum(rho - norm**2, 0)
        # A correction that large refutes the bound. NaN is done: its column stays NaN.
        whole = size + jnp.sqrt(rho)
        small = small & (done | ~(norm > _REFUTED * whole))
        more = theta * norm > eps / 2 * whole
        if not last:
            more = more | (theta * norm**2 > eps / 2 * rho) | (norm**2 > rho)
        more = more & ~done
        rho = jnp.where(done, before[..., 0, :], rho)[..., None, :]
        left = delta if last else jnp.where(more[..., None, :], delta, 0)
        return count + 1, (v, y + delta, total + d, left, rho), ~more, small

    y = gram.solve(c)
    v = f
    if last:
        v = -t.times(y) if f is None else f - t.times(y)
    rho = jnp.zeros((*y.shape[:-2], 1, y.shape[-1]), theta.dtype)
    done = jnp.broadcast_to(~gram.accepted[..., None], size.shape)
    state = varying((0, (v, y, c, y, rho), done, jnp.ones_like(done)))
    # Elsewhere than on CPU the test of a loop costs as much as a correction: the first is made in any case.
    state = platform_dependent(state, cpu=lambda state: state, default=step)
    _, (v, y, total, _, rho), done, small = lax.while_loop(going, step, state)
    return (v, y, total, rho[..., 0, :]), done & small


def least_squares(t: Operator, gram: Gram, f: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """T^+ f, Q^H f, the squared residuals, and per column whether they are as good as any method's."""
    (_, y, c, rho), done = _corrected(t, gram, f, None, last=False)
    return y, c, rho, done


def augmented(
    t: Operator, gram: Gram, f: jax.Array | None, g: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(v, y) with v + T y = f, T^H v = g, and per column whether they are as good as any method's.

    f or g None: zero. With g = 0 y is T^+ f and v its residual, with f = 0 v is T^+H g.
    """
    (v, y, *_), done = _corrected(t, gram, f, g, last=True)
    return v, y, done
