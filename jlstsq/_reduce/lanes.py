"""Many small matrices at once: Householder QR with the batch in the last axis, unrolled over columns.

The work of a matrix of a few columns is less than the call of a library on it. Here every operation
runs over a block of matrices ("lanes"), each in its own lane, with the rounding errors of LAPACK's
method: the R, Q^H b and residual of the Householder QR of [T, b] (Golub 1965), substitution, and for
singular values one-sided Jacobi rotations of R (Hestenes 1958; Drmac and Veselic 2008).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._numerics import abs2, largest, largest_entry, materialized, power_of_two, reflector, varying

# A block stays in the cache, and small: XLA on CPU (jax 0.10.2) gives wrong numbers for a fused
# product and sum over 8192 float32 lanes or more.
LANES = 256
_SWEEPS = 16
# Loops over so few columns are unrolled. On GPU more would save kernels, but what `materialized` is for was
# seen there before it was made: singular values of 8 x 3 wrong by 0.2 where three rotations were unrolled.
_UNROLLED = 2


def worthwhile(*shapes: tuple) -> bool:
    """Whether matrices of these shapes are small; symbolic dimensions are large."""
    known = all(isinstance(d, int) for shape in shapes for d in shape)
    return known and all(shape[-1] <= 8 and shape[-1] * shape[-2] <= 64 for shape in shapes)


class Lanes(NamedTuple):
    """Results with the batch first."""

    solution: jax.Array  # (N, p or m, k)
    residuals: jax.Array  # (N, k), squared norms
    squares: jax.Array  # (N, p), of the column norms of T
    condition: jax.Array  # (N,) a bound of ||R|| ||R^-1||
    dependence: jax.Array  # (N,) gels' measure of dependent columns
    singular_values: jax.Array  # (N, p), or zeros where not asked for
    converged: jax.Array  # (N,) bool, of the singular values


def _loop(count: int, body: Callable, start: Any, *data: Any) -> Any:
    """A loop over columns: unrolled, where that is little code to compile."""
    return lax.fori_loop(0, count, body, varying(start, *data), unroll=count <= _UNROLLED)


def _reflect(j: Any, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One Householder step on w (m, columns, lanes), column j becomes beta e_j from row j on; v and tau."""
    rows = jnp.arange(w.shape[0])[:, None]
    columns = jnp.arange(w.shape[1])[:, None]
    x = w[:, j]
    v, tau, beta = reflector(x, j)
    row = jnp.where(columns > j, (v.conj()[:, None] * w).sum(0), 0)
    w = w - v[:, None] * (jnp.conj(tau)[None] * row)[None]
    column = jnp.where(rows == j, beta, jnp.where(rows < j, x, 0))
    return w.at[:, j].set(column), v, tau


def _reduced(p: int, w: jax.Array) -> jax.Array:
    """W (m, columns, lanes) with its first p columns made triangular."""
    return _loop(p, lambda j, w: _reflect(j, w)[0], w)


def _unit(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W (m, columns, lanes) with its columns scaled to order one, and the powers of two (columns, lanes).

    What is left of a column after some reflections may be eps times smaller, and is squared.
    """
    up, down = power_of_two(largest_entry(w, 0)[0])
    return w * down.astype(w.dtype)[None], up


def _factor(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q (lanes, m, p) and R of one block T (lanes, m, p)."""
    w, up = _unit(jnp.moveaxis(t, 0, -1))
    p = w.shape[1]

    def forward(j, state):
        w, vectors, taus = state
        w, v, tau = _reflect(j, w)
        return w, vectors.at[j].set(v), taus.at[j].set(tau)

    def backward(step, q):
        j = p - 1 - step
        v = vectors[j]
        return q - v[:, None] * (taus[j][None] * (v.conj()[:, None] * q).sum(0))[None]

    start = w, jnp.zeros((p, w.shape[0], w.shape[2]), w.dtype), jnp.zeros(w.shape[1:], w.dtype)
    w, vectors, taus = _loop(p, forward, start, t)
    eye = jnp.broadcast_to(jnp.eye(*w.shape[:2], dtype=w.dtype)[..., None], w.shape)
    q = _loop(p, backward, eye, t)
    return jnp.moveaxis(q, -1, 0), jnp.moveaxis(w[:p] * up.astype(w.dtype)[None], -1, 0)


def _substitute(r: jax.Array, c: jax.Array, adjoint: bool = False) -> jax.Array:
    """R^-1 c, or R^-H c, for the upper triangles r (p, p, lanes) and c (p, k, lanes)."""
    p = r.shape[0]
    a = jnp.swapaxes(r, 0, 1).conj() if adjoint else r

    def row(step, x):
        i = step if adjoint else p - 1 - step
        return x.at[i].set((c[i] - (a[i][:, None] * x).sum(0)) / a[i, i][None])

    return _loop(p, row, jnp.zeros_like(c), r, c)


def _rotate(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Columns x and y made orthogonal by one Jacobi rotation, and the cosine of their angle before."""
    xx, yy, xy = materialized((abs2(x).sum(0), abs2(y).sum(0), (x.conj() * y).sum(0)))
    size, both = abs(xy), jnp.sqrt(xx) * jnp.sqrt(yy)
    cosine = size / jnp.where(both > 0, both, 1)
    some = size > 0
    unit = jnp.where(some, size, 1)
    zeta = (yy - xx) / (2 * unit)
    t = jnp.where(zeta >= 0, 1, -1) / (abs(zeta) + jnp.sqrt(1 + zeta**2))
    cos = jnp.where(some, 1 / jnp.sqrt(1 + t**2), 1)
    sin = jnp.where(some, cos * t, 0).astype(x.dtype)[None]
    cos = cos.astype(x.dtype)[None]
    if jnp.iscomplexobj(x):
        y = y * jnp.where(some, xy / unit.astype(xy.dtype), 1).conj()[None]
    else:
        y = y * jnp.where(xy < 0, -1, 1)[None]
    return cos * x - sin * y, sin * x + cos * y, cosine


def _singular_values(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of the columns of a (p, p, lanes), decreasing, by one-sided Jacobi; whether it converged."""
    p, lanes = a.shape[0], a.shape[-1]
    if p == 1:
        return abs(a[0]), jnp.ones(lanes, bool)
    # The test sees the angles before the sweep; quadratic convergence squares them.
    small = 0.1 * float(jnp.finfo(a.dtype).eps) ** 0.5
    i, j = (jnp.array(x) for x in np.triu_indices(p, 1))

    def sweep(state):
        count, columns, before = state

        def pair(n, state):
            columns, largest = state
            x, y, cosine = _rotate(columns[i[n]], columns[j[n]])
            return columns.at[i[n]].set(x).at[j[n]].set(y), jnp.maximum(largest, cosine)

        start = (columns, jnp.zeros(lanes, a.real.dtype))
        new, angle = _loop(i.shape[0], pair, start)
        # A lane that is done stays as it is, whatever its neighbours need.
        done = before <= small
        return count + 1, jnp.where(done, columns, new), jnp.where(done, before, angle)

    def going(state):
        count, _, largest = state
        return (count < _SWEEPS) & (largest > small).any()

    start = (0, jnp.swapaxes(a, 0, 1), jnp.full(lanes, jnp.inf, a.real.dtype))
    _, columns, largest = lax.while_loop(going, sweep, varying(start))
    return -jnp.sort(-jnp.sqrt(abs2(columns).sum(1)), axis=0), ~(largest > small)


def _block(adjoint: bool, spectrum: bool, t: jax.Array, b: jax.Array) -> Lanes:
    """The results of one block of matrices, T (lanes, m, p) and b (lanes, rows, k)."""
    t, b = jnp.moveaxis(t, 0, -1), jnp.moveaxis(b, 0, -1)
    p = t.shape[1]
    # T = T_s D: x = D^-1 R_s^-1 Q^H b, and T^+H b = T_s (R_s^H R_s)^-1 D^-1 b.
    t, d = _unit(t)
    rows = d[:, None].astype(t.dtype)
    w = _reduced(p, t if adjoint else jnp.concatenate([t, b], axis=1))
    r = w[:p, :p]
    eye = jnp.broadcast_to(jnp.eye(p, dtype=r.dtype)[..., None], r.shape)
    inverse = _substitute(r, eye)
    columns = jnp.sqrt(abs2(r).sum(0))
    if adjoint:
        y = _substitute(r, _substitute(r, b / rows, adjoint=True))
        x = (t[:, :, None] * y[None]).sum(1)
        rho = jnp.zeros(b.shape[1:], columns.dtype)
    else:
        x = _substitute(r, w[:p, p:]) / rows
        rho = abs2(w[p:, p:]).sum(0)
    dependence = largest((columns[:, None] * abs(inverse)).sum(0), 0)
    columns, inverse_size = columns * d, abs(inverse) / d[:, None]
    squares = columns**2
    s, converged = jnp.zeros_like(columns), jnp.ones(t.shape[-1:], bool)
    if spectrum:
        size = d.max(0)
        s, converged = _singular_values(r * (d / size[None]).astype(r.dtype)[None])
        s = s * size[None]
    out = Lanes(
        solution=x,
        residuals=rho,
        squares=squares,
        condition=jnp.sqrt(squares.sum(0)) * jnp.sqrt((inverse_size**2).sum((0, 1))),
        dependence=dependence,
        singular_values=s,
        converged=converged,
    )
    return Lanes(*(jnp.moveaxis(a, -1, 0) for a in out))


def _over_blocks(fun: Callable, *args: jax.Array) -> Any:
    """`fun` of the leading axis of its arguments, on CPU block by block."""
    n = args[0].shape[0]
    if n <= LANES:
        return fun(*args)

    def cpu(*args):
        blocks = -(-n // LANES)
        padded = (
            jnp.pad(a, ((0, blocks * LANES - n), (0, 0), (0, 0))).reshape(blocks, LANES, *a.shape[1:])
            for a in args
        )
        out = lax.map(lambda block: fun(*block), tuple(padded))
        return jax.tree.map(lambda a: a.reshape(blocks * LANES, *a.shape[2:])[:n], out)

    return lax.platform_dependent(*args, cpu=cpu, default=fun)


def solve(adjoint: bool, spectrum: bool, t: jax.Array, b: jax.Array) -> Lanes:
    """T^+ b or T^+H b for T (N, m, p) and b (N, rows, k), and what is to be known of R."""
    return _over_blocks(partial(_block, adjoint, spectrum), t, b)


def orthonormal(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R for T (*batch, m, p)."""
    batch = t.shape[:-2]
    out = _over_blocks(_factor, t.reshape(-1, *t.shape[-2:]))
    q, r = (a.reshape(*batch, *a.shape[1:]) for a in out)
    return q, r
