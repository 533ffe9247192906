"""Many small matrices at once: factorisations with the batch in the last axis.

The work of a matrix of a few columns is less than the call of a library on it. Here every operation
runs over a block of matrices ("lanes"), each in its own lane, with the rounding errors of LAPACK's
methods: Householder QR (Golub 1965), substitution, and for the singular value decomposition of R
one-sided Jacobi rotations of R^H (Hestenes 1958; Drmac and Veselic 2008).

What other modules call with the batch first is `qr`, `svd` and the like; the other functions have it last.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._kernel import LIBRARY, largest_sum, materialized, one_kernel
from ._numerics import abs2, block_by_block, largest_entry, power_of_two, small, varying
from ._platform import platform_dependent

# A block stays in the cache, and small: XLA on CPU (jax 0.10.2) gives wrong numbers for a fused
# product and sum over 8192 float32 lanes or more.
LANES = 64
_SWEEPS = 16
# Loops over so few columns are unrolled. Householder's steps are always: each works on less than the one
# before. Where only rounding errors are left of a column, they have to be the same ones in all places
# (`materialized`): residuals of dependent columns were wrong by as much as they are large.
_UNROLLED = 2


# Columns, real and complex, up to which a batch is faster here than by what else there is on CPU: the
# library's QR of [T, b] and SVD (ten times at two columns).
PROJECT, SVD = (3, 3), (6, 4)


def few(a: jax.Array, columns: tuple[int, int]) -> bool:
    """Whether a is a batch of small matrices of at most so many columns, real and complex."""
    return a.ndim > 2 and small(a.shape) and a.shape[-1] <= columns[jnp.iscomplexobj(a)]


def _loop(count: int, body: Callable, start: Any, *data: Any) -> Any:
    """A loop over columns: unrolled, where that is little code to compile."""
    return lax.fori_loop(0, count, body, varying(start, *data), unroll=count <= _UNROLLED)


def _reflector(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v, tau, beta with (I - conj(tau) [1; v] [1; v]^H) x = beta e_1 (xLARFG).

    Of the columns x (m, ...), which lie in the first axis and are of order one: one of which so little is
    left that squares lose digits to underflow counts as zero. Squares half lost make H far from unitary.
    """
    alpha, below = x[0], x[1:]
    tail = abs2(below).sum(0)
    squares = abs2(alpha) + tail
    info = jnp.finfo(x.dtype)
    nothing = squares <= float(info.tiny) / float(info.eps)
    norm = jnp.sqrt(squares)
    beta = jnp.where(alpha.real > 0, -norm, norm).astype(x.dtype)
    # Nothing to reflect: H = I, as in LAPACK. A complex pivot is still made real.
    trivial = (tail == 0) & (alpha.imag == 0) if jnp.iscomplexobj(x) else tail == 0
    trivial = trivial | nothing
    tau = jnp.where(trivial, 0, (beta - alpha) / jnp.where(trivial, 1, beta))
    v = below * jnp.where(trivial, 0, 1 / jnp.where(trivial, 1, alpha - beta))[None]
    return v, tau, jnp.where(nothing, 0, jnp.where(trivial, alpha, beta))


def _applied(v: jax.Array, tau: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(I - tau [1; v] [1; v]^H) W, W (m, columns, lanes): the first row and the others."""
    top, below = w[0], w[1:]
    along = (top + (v.conj()[:, None] * below).sum(0)) * tau[None]
    return top - along, below - v[:, None] * along[None]


def _reflect(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One Householder step on w (m, columns, lanes): its first row, what is left of the others; v and tau."""
    v, tau, beta = materialized(_reflector, w[:, 0])
    # What is left may be rounding errors, and has to be the same ones everywhere.
    top, below = materialized(_applied, v, tau.conj(), w[:, 1:])
    return jnp.concatenate([beta[None], top]), below, v, tau


def _triangular(rows: list[jax.Array]) -> jax.Array:
    """The rows of a triangle, each from its diagonal entry on, as one array."""
    return jnp.stack([jnp.pad(row, ((i, 0), (0, 0))) for i, row in enumerate(rows)])


def reduced(p: int, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q^H W, W (m, columns, lanes), for the Q of its first p columns: p rows, and what is not zero below."""
    rows = []
    for _ in range(p):
        row, w, _, _ = _reflect(w)
        rows.append(row)
    return _triangular(rows), w


def unit(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W (m, columns, lanes) with its columns scaled to order one; the powers of two; where they are finite.

    What is left of a column after some reflections may be eps times smaller, and is squared. The power
    of a column of zeros is the largest of the others.
    """
    size, finite = largest_entry(w, 0)
    up, down = materialized(power_of_two, jnp.where(size > 0, size, size.max(0, initial=0)[None]))
    return w * down.astype(w.dtype)[None], up, finite


def _factored(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of W (m, p, lanes), its columns of order one."""
    rows, vectors = [], []
    for _ in range(w.shape[1]):
        row, w, *reflector = _reflect(w)
        rows.append(row)
        vectors.append(reflector)
    q = w
    for v, tau in reversed(vectors):
        # H diag(1, Q)
        along = (v.conj()[:, None] * q).sum(0) * tau[None]
        top = jnp.concatenate([1 - tau[None], -along])
        q = jnp.concatenate([(-v * tau[None])[:, None], q - v[:, None] * along[None]], axis=1)
        q = jnp.concatenate([top[None], q])
    return q, _triangular(rows)


def _qr(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q (m, p, lanes) and R of one block T (m, p, lanes)."""
    w, up, _ = unit(t)
    q, r = _factored(w)
    return q, r * up.astype(w.dtype)[None]


def _triangle(t: jax.Array) -> tuple[jax.Array]:
    """R of one block T (m, columns, lanes), tall or wide."""
    w, up, _ = unit(t)
    r, _ = reduced(min(w.shape[:2]), w)
    return (r * up.astype(w.dtype)[None],)


def _project(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the squared norms of the columns of (I - Q Q^H) b for one block."""
    w, up, _ = unit(t)
    p = w.shape[1]
    r, left = reduced(p, jnp.concatenate([w, b], axis=1))
    return r[:, :p] * up.astype(w.dtype)[None], r[:, p:], abs2(left).sum(0)


def substitute(r: jax.Array, c: jax.Array, adjoint: bool = False) -> jax.Array:
    """R^-1 c, or R^-H c, for the upper triangles r (p, p, lanes) and c (p, k, lanes)."""
    p = r.shape[0]
    a = jnp.swapaxes(r, 0, 1).conj() if adjoint else r

    def row(step, x):
        i = step if adjoint else p - 1 - step
        new = (c[i] - (a[i][:, None] * x).sum(0)) / a[i, i][None]
        return lax.dynamic_update_index_in_dim(x, new, i, 0)

    return _loop(p, row, jnp.zeros_like(c), r, c)


def _pivoted_qr(a: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rp, U^H C and the permutation with A[:, perm] = U Rp of one block; of equal columns the first leads."""
    w, up, _ = unit(a)
    p = w.shape[1]
    index = jnp.arange(p)[:, None]
    w, free = jnp.concatenate([w, c], axis=1), jnp.ones(up.shape, bool)
    rows, order = [], []
    # Columns stay in their places until the end.
    for _ in range(p):
        columns = w[:, :p]
        left = jnp.where(free, up * jnp.sqrt(abs2(columns).sum(0)), -1)
        first = jnp.where(left == left.max(0)[None], index, p).min(0)
        chosen = index == first[None]
        v, tau, beta = materialized(_reflector, jnp.where(chosen[None], columns, 0).sum(1))
        row, w = materialized(_applied, v, tau.conj(), w)
        rows.append(jnp.concatenate([jnp.where(chosen, beta[None], row[:p]), row[p:]]))
        order.append(chosen)
        free = free & ~chosen
    rows, order = jnp.stack(rows), jnp.stack(order)
    upper = (index <= jnp.arange(p)[None])[..., None]
    scaled = (rows[:, :p] * up.astype(w.dtype)[None])[:, None]
    r = jnp.where(upper[:, :, None] & order[None], scaled, 0).sum(2)
    return r, rows[:, p:], jnp.where(order, index[None], 0).sum(1)


def _powers(columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Powers of two (p, lanes) next to the largest entries of columns (p, rows, lanes), and the inverses."""
    parts = (columns.real, columns.imag) if jnp.iscomplexobj(columns) else (columns,)
    return power_of_two(abs(jnp.concatenate(parts, axis=1)).max(1))


def norms(columns: jax.Array) -> jax.Array:
    """The norms of columns (p, rows, lanes) of any scale."""
    up, down = _powers(columns)
    return up * jnp.sqrt(abs2(columns * down[:, None].astype(columns.dtype)).sum(1))


def _inner_products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return abs2(x).sum(1), abs2(y).sum(1), (x.conj() * y).sum(1)


def _rotate(p: int, floor: jax.Array, x: jax.Array, y: jax.Array, x_down: jax.Array, y_down: jax.Array):
    """Pairs of columns x and y (pairs, rows, lanes), each turned to be orthogonal in their first p rows.

    Also the cosine of their angle before, zero where one is shorter than `floor` (Jacobi). `x_down` and
    `y_down` (pairs, lanes) scale what is squared.
    """
    first, second = x[:, :p] * x_down[:, None].astype(x.dtype), y[:, :p] * y_down[:, None].astype(x.dtype)
    xx, yy, xy = materialized(_inner_products, first, second)
    size, both = abs(xy), jnp.sqrt(xx) * jnp.sqrt(yy)
    nothing = (xx <= (floor * x_down) ** 2) | (yy <= (floor * y_down) ** 2)
    cosine = jnp.where(nothing, 0, size / jnp.where(both > 0, both, 1))
    some = size > 0
    unit = jnp.where(some, size, 1)
    zeta = (yy * (x_down / y_down) - xx * (y_down / x_down)) / (2 * unit)
    # The square of a large zeta overflows, and adds nothing to it.
    large = float(1 / jnp.finfo(x.dtype).eps)
    root = jnp.maximum(abs(zeta), jnp.sqrt(1 + jnp.minimum(abs(zeta), large) ** 2))
    t = jnp.where(zeta >= 0, 1, -1) / (abs(zeta) + root)
    cos = jnp.where(some, 1 / jnp.sqrt(1 + t**2), 1)
    sin = jnp.where(some, cos * t, 0).astype(x.dtype)[:, None]
    cos = cos.astype(x.dtype)[:, None]
    if jnp.iscomplexobj(x):
        y = y * jnp.where(some, xy / unit.astype(xy.dtype), 1).conj()[:, None]
    else:
        y = y * jnp.where(xy < 0, -1, 1)[:, None]
    return cos * x - sin * y, sin * x + cos * y, cosine


def orthogonalised(p: int, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns (p, rows, lanes), turned until they are orthogonal in their first p rows; whether they are.

    A sweep takes all pairs, as many at once as have no column in common, and moves the columns on in
    a circle, all or all but the first (the round-robin order; Brent and Luk 1985). Columns below eps^2
    of the whole, rounding errors of rounding errors, are turned but not waited for: of parallel ones
    every sweep leaves eps times as much, in any direction.
    """
    lanes, half, fixed = columns.shape[-1], p // 2, 1 - p % 2
    if p == 1:
        return columns, jnp.ones(lanes, bool)
    # The test sees the angles before the sweep; quadratic convergence squares them.
    eps = float(jnp.finfo(columns.dtype).eps)
    small = 0.1 * eps**0.5
    floor = eps**2 * norms(columns[:, :p]).max(0)[None]
    # A column that later is much shorter is rounding errors.
    _, down = _powers(columns[:, :p])

    def moved_on(a):
        return a if p == 2 else jnp.concatenate([a[:fixed], a[-1:], a[fixed:-1]])

    def pairs(_, state):
        columns, down, largest = state
        x, y = columns[:half], columns[p - half :][::-1]
        x, y, cosine = _rotate(p, floor, x, y, down[:half], down[p - half :][::-1])
        columns = jnp.concatenate([x, columns[half : p - half], y[::-1]])
        return moved_on(columns), moved_on(down), jnp.maximum(largest, cosine.max(0))

    def sweep(state):
        count, columns, before = state
        start = (columns, down, jnp.zeros(lanes, down.dtype))
        new, _, angle = _loop(p - fixed, pairs, start)
        # A lane that is done stays as it is, whatever its neighbours need.
        done = before <= small
        return count + 1, jnp.where(done, columns, new), jnp.where(done, before, angle)

    def going(state):
        count, _, largest = state
        return (count < _SWEEPS) & (largest > small).any()

    start = (0, columns, jnp.full(lanes, jnp.inf, columns.real.dtype))
    _, columns, largest = lax.while_loop(going, sweep, varying(start))
    return columns, ~(largest > small)


def by_size(s: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """The numbers s (p, lanes) in decreasing order, and others (p, ..., lanes) in the same.

    By comparing all: XLA on CPU sorts one lane at a time.
    """
    index = jnp.arange(s.shape[0])
    mine, other = s[:, None], s[None]
    earlier = (index[:, None] > index[None])[..., None]
    place = ((other > mine) | ((other == mine) & earlier)).sum(1)

    def sort(a):
        # Not one sum, which would have p times the terms of any other.
        places = place.reshape(place.shape[0], *(1,) * (a.ndim - 2), -1)
        to = index.reshape(-1, *(1,) * (a.ndim - 1))
        return reduce(jnp.add, (jnp.where(places[i][None] == to, a[i][None], 0) for i in range(a.shape[0])))

    return tuple(sort(a) for a in (s, *others))


def _rotated(a: jax.Array, vectors: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one block A (p, p, lanes) s, V diag(s) as columns (p, p or 2 p, lanes) above U, and its size."""
    p = a.shape[0]
    size, down = power_of_two(largest_entry(a, (0, 1))[0])
    w = a * down[None, None].astype(a.dtype)
    if vectors:
        w = jnp.concatenate([w, jnp.broadcast_to(jnp.eye(p, dtype=w.dtype)[..., None], w.shape)], axis=1)
    # A^H U = V diag(s)
    columns, converged = orthogonalised(p, w.conj())
    s, columns = materialized(by_size, norms(columns[:, :p]), columns)
    return jnp.where(converged[None], s, jnp.nan), columns, size


def _singular_values(a: jax.Array) -> tuple[jax.Array]:
    """Those of one block A (p, p, lanes), decreasing."""
    s, _, size = _rotated(a, False)
    return (s * size[None],)


def _svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s and V^H of one block A (p, p, lanes)."""
    p = a.shape[0]
    s, columns, size = _rotated(a, True)
    # V also where s is zero or nearly so
    v = columns[:, :p] * (1 / jnp.where(s > 0, s, 1))[:, None].astype(columns.dtype)
    v, r = _factored(jnp.swapaxes(v, 0, 1))
    diagonal = jnp.stack([r[i, i] for i in range(p)])
    length = abs(diagonal)
    v = v * jnp.where(length > 0, diagonal / jnp.where(length > 0, length, 1).astype(v.dtype), 1)[None]
    return jnp.swapaxes(columns[:, p:], 0, 1), s * size[None], jnp.swapaxes(v, 0, 1).conj()


def _eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of one block A (p, p, lanes), positive semidefinite: s and U."""
    s, columns, size = _rotated(a, True)
    return s * size[None], jnp.swapaxes(columns[:, a.shape[0] :], 0, 1)


def _turned(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s and U^H A = diag(s) V^H of one block A (p, p, lanes), to the accuracy of Jacobi rotations."""
    s, columns, size = _rotated(a, True)
    p = a.shape[0]
    rows = columns[:, :p].conj() * size[None, None].astype(a.dtype)
    return jnp.swapaxes(columns[:, p:], 0, 1), s * size[None], rows


def _batch_first(fun: Callable[..., tuple]) -> Callable[..., tuple]:
    """`fun`, of arrays with the batch last, of such with the batch first."""

    def call(*args):
        return tuple(jnp.moveaxis(a, -1, 0) for a in fun(*(jnp.moveaxis(a, 0, -1) for a in args)))

    return call


def over_blocks(fun: Callable[..., tuple], *args: jax.Array) -> tuple:
    """`fun`, of arrays with the batch last, of args with the batch first, as the results have it.

    On CPU in blocks of up to `LANES`, in one kernel.
    """
    n = args[0].shape[0]

    def cpu(*args):
        block, lanes = jax.jit(fun), min(n, LANES)
        sizes = (jax.ShapeDtypeStruct((*a.shape[1:], lanes), a.dtype) for a in args)
        terms = largest_sum(block.trace(*sizes))
        while terms >= LIBRARY and lanes > 1:
            terms, lanes = terms // 2, lanes // 2
        # Behind a call the change of axes is a copy; else XLA makes it anew in every loop that reads the
        # data, none of which then is over neighbours in memory.
        inner = _batch_first(one_kernel(block))
        return (
            one_kernel(lambda *args: block_by_block(inner, lanes, args))(*args) if n > lanes else inner(*args)
        )

    return platform_dependent(*args, cpu=cpu, default=_batch_first(fun))


def _batched(fun: Callable, *args: jax.Array) -> tuple[jax.Array, ...]:
    batch = args[0].shape[:-2]
    shapes = [a.shape[len(batch) :] for a in args]
    flat = (a.reshape(math.prod(batch), *shape) for a, shape in zip(args, shapes, strict=True))
    out = over_blocks(fun, *flat)
    return tuple(a.reshape(*batch, *a.shape[1:]) for a in out)


def qr(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R for T (*batch, m, p)."""
    q, r = _batched(_qr, t)
    return q, r


def triangle(t: jax.Array) -> tuple[jax.Array]:
    """R of T (*batch, m, p), with as many rows as the smaller of both."""
    (r,) = _batched(_triangle, t)
    return (r,)


def project(t: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and the squared norms of the columns of (I - Q Q^H) b for T (*batch, m, p)."""
    r, c, tail = _batched(_project, t, b)
    return r, c, tail


def pivoted_qr(a: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rp, U^H C and the permutation with A[:, perm] = U Rp for A (*batch, p, p) and C (*batch, p, k)."""
    r, c, perm = _batched(_pivoted_qr, a, c)
    return r, c, perm


def svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s and V^H for A (*batch, p, p)."""
    u, s, vh = _batched(_svd, a)
    return u, s, vh


def turned(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s and U^H A = diag(s) V^H for A (*batch, p, p)."""
    u, s, rows = _batched(_turned, a)
    return u, s, rows


def singular_values(a: jax.Array) -> tuple[jax.Array]:
    """Those of A (*batch, p, p), decreasing."""
    (s,) = _batched(_singular_values, a)
    return (s,)


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, decreasing, and eigenvectors of A (*batch, p, p), positive semidefinite."""
    s, u = _batched(_eigh, a)
    return s, u
