"""Many small matrices at once: Householder QR with the batch in the last axis, unrolled over columns.

The work of a matrix of a few columns is less than the call of a library on it. Here every operation
runs over a block of matrices ("lanes"), each in its own lane, with the rounding errors of LAPACK's
method: the R, Q^H b and residual of the Householder QR of [T, b] (Golub 1965), substitution, and for
singular values one-sided Jacobi rotations of R (Hestenes 1958; Drmac and Veselic 2008).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import abs2

# A block stays in the cache, and small: XLA on CPU (jax 0.10.2) gives wrong numbers for a fused
# product and sum over 8192 float32 lanes or more.
_LANES = 256
_SWEEPS = 16


class Lanes(NamedTuple):
    """Results with the batch first."""

    solution: jax.Array  # (N, p or m, k)
    residuals: jax.Array  # (N, k), squared norms
    squares: jax.Array  # (N, p), of the column norms of T
    condition: jax.Array  # (N,) a bound of ||R|| ||R^-1||
    dependence: jax.Array  # (N,) gels' measure of dependent columns
    singular_values: jax.Array  # (N, p), or zeros where not asked for
    converged: jax.Array  # (N,) bool, of the singular values


def _reflect(w: jax.Array, j: int) -> jax.Array:
    """One Householder step on w (m, columns, lanes): column j becomes beta e_j from row j on."""
    x = w[j:, j]
    alpha = x[0]
    tail = abs2(x[1:]).sum(0)
    norm = jnp.sqrt(abs2(alpha) + tail)
    # Nothing to reflect: H = I, as in LAPACK. A complex pivot is still made real.
    trivial = (tail == 0) & (alpha.imag == 0) if jnp.iscomplexobj(w) else tail == 0
    beta = jnp.where(alpha.real > 0, -norm, norm).astype(alpha.dtype)
    pivot = jnp.where(trivial, 1, alpha - beta)
    tau = jnp.where(trivial, 0, (beta - alpha) / jnp.where(trivial, 1, beta))
    v = jnp.concatenate([jnp.ones_like(alpha)[None], x[1:] / pivot])
    rest = w[j:, j + 1 :]
    row = (v.conj()[:, None] * rest).sum(0)
    rest = rest - v[:, None] * (jnp.conj(tau) * row)
    column = jnp.concatenate([jnp.where(trivial, alpha, beta)[None], jnp.zeros_like(x[1:])])
    return w.at[j:, j + 1 :].set(rest).at[j:, j].set(column)


def _substitute(r: jax.Array, c: jax.Array) -> jax.Array:
    """R^-1 c for the upper triangles r (p, p, lanes) and c (p, k, lanes)."""
    rows: list[jax.Array] = []
    for i in reversed(range(r.shape[0])):
        known = sum((r[i, j] * x for j, x in zip(range(i + 1, r.shape[0]), rows, strict=True)), start=0)
        rows.insert(0, (c[i] - known) / r[i, i])
    return jnp.stack(rows)


def _substitute_adjoint(r: jax.Array, c: jax.Array) -> jax.Array:
    """R^-H c."""
    rows: list[jax.Array] = []
    for i in range(r.shape[0]):
        known = sum((r[j, i].conj() * x for j, x in enumerate(rows)), start=0)
        rows.append((c[i] - known) / r[i, i].conj())
    return jnp.stack(rows)


def _singular_values(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of the columns of a (p, p, lanes), decreasing, by one-sided Jacobi; whether it converged."""
    p = a.shape[0]
    eps = float(jnp.finfo(a.dtype).eps)

    def sweep(state):
        count, columns, _ = state
        columns = list(columns)
        largest = jnp.zeros(a.shape[-1], columns[0].real.dtype)
        for i in range(p):
            for j in range(i + 1, p):
                x, y = columns[i], columns[j]
                xx, yy = abs2(x).sum(0), abs2(y).sum(0)
                xy = (x.conj() * y).sum(0)
                size, both = abs(xy), jnp.sqrt(xx) * jnp.sqrt(yy)
                largest = jnp.maximum(largest, jnp.where(size > 0, size / jnp.where(both > 0, both, 1), 0))
                rotate = size > 0
                zeta = (yy - xx) / (2 * jnp.where(rotate, size, 1))
                t = jnp.where(zeta >= 0, 1, -1) / (abs(zeta) + jnp.sqrt(1 + zeta**2))
                cos = 1 / jnp.sqrt(1 + t**2)
                cos = jnp.where(rotate, cos, 1)
                sin = jnp.where(rotate, cos * t, 0)
                cos, sin = cos.astype(a.dtype), sin.astype(a.dtype)
                phase = xy / jnp.where(rotate, size, 1).astype(a.dtype)
                y_ = y * phase.conj()
                columns[i], columns[j] = cos * x - sin * y_, sin * x + cos * y_
        return count + 1, tuple(columns), largest

    def going(state):
        count, _, largest = state
        # the test sees the angles before the sweep: quadratic convergence makes them eps after it
        return (count < _SWEEPS) & (largest > eps**0.5 * 0.1).any()

    start = (0, tuple(a[:, j] for j in range(p)), jnp.full(a.shape[-1], jnp.inf, a.real.dtype))
    _, columns, largest = lax.while_loop(going, sweep, start)
    s = jnp.sqrt(jnp.stack([abs2(x).sum(0) for x in columns]))
    return -jnp.sort(-s, axis=0), ~(largest > eps**0.5 * 0.1)


def _block(adjoint: bool, spectrum: bool, tb: tuple[jax.Array, jax.Array]) -> Lanes:
    """The results of one block of matrices, T (lanes, m, p) and b (lanes, rows, k)."""
    t, b = (jnp.moveaxis(a, 0, -1) for a in tb)
    p = t.shape[1]
    w = t if adjoint else jnp.concatenate([t, b], axis=1)
    for j in range(min(p, w.shape[0])):
        w = _reflect(w, j)
    r = w[:p, :p]
    eye = jnp.broadcast_to(jnp.eye(p, dtype=r.dtype)[..., None], r.shape)
    inverse = _substitute(r, eye)
    squares = abs2(r).sum(0)
    columns = jnp.sqrt(squares)
    if adjoint:
        y = _substitute(r, _substitute_adjoint(r, b))
        x = (t[:, :, None] * y).sum(1)
        rho = jnp.zeros(b.shape[1:], squares.dtype)
    else:
        x = _substitute(r, w[:p, p:])
        rho = abs2(w[p:, p:]).sum(0)
    inverse_size = abs(inverse)
    s, converged = jnp.zeros_like(columns), jnp.ones(t.shape[-1:], bool)
    if spectrum:
        s, converged = _singular_values(r)
    out = Lanes(
        solution=x,
        residuals=rho,
        squares=squares,
        condition=jnp.sqrt(squares.sum(0)) * jnp.sqrt((inverse_size**2).sum((0, 1))),
        dependence=(columns[:, None] * inverse_size).sum(0).max(0),
        singular_values=s,
        converged=converged,
    )
    return Lanes(*(jnp.moveaxis(a, -1, 0) for a in out))


def solve(adjoint: bool, spectrum: bool, t: jax.Array, b: jax.Array) -> Lanes:
    """T^+ b or T^+H b for T (N, m, p) and b (N, rows, k), and what is to be known of R."""

    def whole(t, b):
        return _block(adjoint, spectrum, (t, b))

    n = t.shape[0]
    if n <= _LANES:
        return whole(t, b)

    def cpu(t, b):
        blocks = -(-n // _LANES)
        padded = [
            jnp.pad(a, ((0, blocks * _LANES - n), (0, 0), (0, 0))).reshape(blocks, _LANES, *a.shape[1:])
            for a in (t, b)
        ]
        out = lax.map(partial(_block, adjoint, spectrum), tuple(padded))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)

    return lax.platform_dependent(t, b, cpu=cpu, default=whole)
