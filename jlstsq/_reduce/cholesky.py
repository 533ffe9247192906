"""QR by Cholesky of the Gram matrix: T = Z R1 with Z = T R1^-1, and Z^H Z = R2^H R2 once more.

Products instead of Householder's reflections, for a T that is not too ill conditioned, and known to
be: G = T^H T, scaled to unit diagonal, has the Cholesky factor R with R^H R = D G D + E, where E is
the error of the products, at most p gamma in norm (unit diagonal, gamma the growth of a sum of m
terms), plus that of Cholesky, p (p + 1) eps. So T D R^-1 is orthonormal to theta = |E| |R^-1|^2, and
|R^-1| is bounded, not estimated. Accepted where theta is at most 0.1: the spectrum of R is then
within 6 % of that of T D, and R2 R is as stable as Householder's (CholeskyQR2: Yamamoto, Nakatsukasa,
Yanagisawa and Fukaya 2015, Electron. Trans. Numer. Anal. 44).

A single precision T has its Gram matrix, and all that is made of it, in double precision on CPU, but for
few columns: that takes twice the time, but is accepted up to a condition number of about 1e5 instead of
10. R and R^-1 are kept as two numbers of single precision each, and the equations are solved in double
(`_fast.seminormal`). R is as good as Householder's.

R^-1 is formed where that is cheap, since products with it are. For one large matrix it is not: values then
substitute with R, and |R^-1| is bounded from random vectors (`_norms`).
"""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._decompose.pivoted_qr import grading
from .._library import cholesky, inverse, qr, triangular_solve
from .._norms import frobenius, inverse_norm_bound, norm2_bound
from .._numerics import (
    H,
    column_norms,
    cond,
    cond_on_cpu,
    double_precision,
    identity_like,
    in_double,
    largest,
    largest_entry,
    mm,
    scaled,
    varying,
    where_matrix,
)
from .._operator import adjoint_times
from .._platform import platform_dependent

_CONTRACTION = 0.1
# Products sum in blocks of at most about this many terms, then over the blocks.
_BLOCK = 512
# XLA on CPU does not for so few columns: one running sum over all rows, wrong by 1e-4 at 1e6 rows of float32.
_FEW = 3
# Rows at a time, where the product of the whole would be slow.
_ROWS = 2000
# Columns from which single precision in double is no faster than Householder's method unless m is large.
_LARGE = 128
# Columns of one matrix from which substitution with R costs less than R^-1.
_IMPLICIT = 256
# Of its power iteration: the bound is about 4 times the norm.
_STEPS = 2
# Relative error of a double in two numbers of single precision, and of products with it.
_LOW = 2.0**-46
# Growth of the backward error, per column of T, with which a product takes the place of substitution (after
# `grading` 1 to 10, of monomials 25), and how often it is corrected otherwise.
GROWTH, _CORRECTIONS = 30.0, 2
# Condition number of R1 from which the explicit R1^-1 costs a digit.
_HARMLESS = 10.0


class Gram(NamedTuple):
    """The scaled Cholesky factor of T^H T."""

    # (*batch, p, p), D R^-1: (D R^-1)(D R^-1)^H = (T^H T)^-1; None: not formed
    inverse: jax.Array | None
    triangle: jax.Array  # (*batch, p, p), R D^-1: its Gram matrix is that of T, to rounding
    # what rounding these two to single precision took from them, where they were in double; None in float64
    inverse_low: jax.Array | None
    triangle_low: jax.Array | None
    inverse_norm: jax.Array  # (*batch) a bound of ||R^-1||
    contraction: jax.Array  # (*batch) theta
    condition: jax.Array  # (*batch) a bound of ||T|| ||T^+||
    accepted: jax.Array  # (*batch) bool: G lost nothing, is definite, and theta small
    squares: jax.Array  # (*batch, p), of the column norms
    precise: jax.Array  # (*batch) bool: the triangle is R as good as Householder's

    def as_computed(self, dtype: Any) -> "Gram":
        """The same in double precision."""

        def whole(high, low):
            return None if high is None or low is None else high.astype(dtype) + low.astype(dtype)

        inverse, triangle = whole(self.inverse, self.inverse_low), whole(self.triangle, self.triangle_low)
        return self._replace(inverse=inverse, triangle=triangle, inverse_low=None, triangle_low=None)

    def solve(self, c: jax.Array) -> jax.Array:
        """D R^-1 c."""
        return triangular_solve(self.triangle, c) if self.inverse is None else mm(self.inverse, c)

    def adjoint_solve(self, c: jax.Array) -> jax.Array:
        """R^-H D c."""
        if self.inverse is None:
            return triangular_solve(self.triangle, c, adjoint=True)
        return mm(H(self.inverse), c)


def worthwhile(shape: tuple, dtype: Any) -> bool:
    """Whether T of this shape is likely to be accepted.

    A square one gains nothing. The same for one matrix and for a batch, since a user's vmap makes one of
    the other.
    """
    m, p = shape[-2:]
    if not isinstance(m, int) or not isinstance(p, int):
        return False
    return m >= (4 if jnp.finfo(dtype).bits == 32 and p > _LARGE else 2) * p


def range_of(m: int, dtype: Any) -> tuple[float, float]:
    """Between which squares no term of a sum of m that counts is lost to underflow or overflow."""
    info = jnp.finfo(dtype)
    return float(4 * m * (info.tiny / info.eps)), float(info.max * info.eps)


def in_range(m: int, squares: jax.Array) -> jax.Array:
    """Whether these squared column norms (*batch, p) lost nothing."""
    low, high = range_of(m, squares.dtype)
    return ((squares > low) & (squares < high)).all(-1)


def finite(t: jax.Array, squares: jax.Array) -> jax.Array:
    """Where T is finite. Column norms that are not mean NaN, Inf or an overflow: that costs a pass over T."""
    known = jnp.isfinite(squares).all(-1)

    def looked_for():
        return known | largest_entry(t, (-2, -1))[1]

    return cond_on_cpu(~known.all(), looked_for, lambda: jnp.ones_like(known), t)


def _block(m: int) -> int:
    """Terms of a sum that are added up before the sums are.

    About `_BLOCK`, and such that m is a multiple and its blocks many times even in number, where there is
    such a number: rows that are sharded over devices then stay where they are.
    """
    divisors = [d for d in range(_BLOCK // 2, 2 * _BLOCK + 1) if m % d == 0]
    return max(divisors, key=lambda d: (m // d) & -(m // d), default=_BLOCK)


def _rounding(m: int, p: int, dtype: Any) -> float:
    """A bound of the error of R^H R in norm, for unit columns: sums of m terms, then of p.

    Sums in blocks, and with the probabilistic bound min(n, 4 sqrt(n)) eps / 2 for the error of n
    operations (Higham and Mary 2019, SIAM J. Sci. Comput. 41).
    """
    block = _block(m) if p <= _FEW else _BLOCK
    operations = min(m, block + m / block) + 4 * (p + 1)
    return p * min(operations, 4 * operations**0.5) * float(jnp.finfo(dtype).eps) / 2


def product(t: jax.Array, rows_apart: bool = False, dtype: Any = None) -> jax.Array:
    """T^H T in the precision `dtype`; `rows_apart` where T is the adjoint of what lies in memory.

    XLA on CPU multiplies a transpose that it does not store at half the speed in float64. To store it
    pays for large p, in blocks where T is tall, and for batches.
    """
    m, p = t.shape[-2:]
    dtype = t.dtype if dtype is None else dtype
    wider = dtype != t.dtype

    def stored(t):
        columns = lax.optimization_barrier(t.mT.astype(dtype))
        return mm(columns.conj(), columns.mT)

    def blocked(t):
        whole = m // _ROWS * _ROWS
        total, _ = lax.scan(
            lambda total, rows: (total + stored(rows), None),
            varying(jnp.zeros((p, p), dtype), t),
            t[:whole].reshape(-1, _ROWS, p),
        )
        return total + plain(t[whole:])

    def plain(t):
        t = t.astype(dtype)
        return mm(H(t), t)

    def apart(t):
        rows = lax.optimization_barrier(H(t).astype(dtype))
        return mm(rows, H(rows))

    def summed(t):
        block = _block(m)
        whole = m // block * block
        total = plain(t[:whole].reshape(-1, block, p)).sum(0)
        return total if whole == m else total + plain(t[whole:])

    if t.ndim == 2 and p <= _FEW and m > _BLOCK:
        return summed(t)
    if t.ndim > 2 and not rows_apart:
        t = t.astype(dtype)
        return platform_dependent(t, cpu=lambda t: mm(lax.optimization_barrier(H(t)), t), default=plain)
    if wider and t.ndim == 2 and rows_apart:
        # Otherwise XLA converts T into the order that other uses of it prefer.
        return apart(t)
    if wider and t.ndim == 2 and not rows_apart and m >= 4 * _ROWS:
        return blocked(t)
    if t.ndim == 2 and dtype == jnp.float64 and not rows_apart and p > 64:
        return platform_dependent(t, cpu=blocked if m >= 4 * _ROWS else stored, default=plain)
    return plain(t)


def factor(t: jax.Array, rows_apart: bool = False, explicit: bool = True) -> Gram:
    """Cholesky of the Gram matrix of T (*batch, m, p).

    Without R^-1 where that pays and it need not be explicit.
    """
    implicit = not explicit and t.ndim == 2 and t.shape[-1] >= _IMPLICIT
    plain = partial(_factor, rows_apart, False, implicit)
    if not in_double(t.shape, t.dtype):
        return plain(t)
    return platform_dependent(t, cpu=partial(_factor, rows_apart, True, implicit), default=plain)


def _scaled_product(rows_apart: bool, t: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """D T^H T D, the squared column norms, D and whether all of them are positive numbers."""
    g = product(t, rows_apart, dtype)
    squares = jnp.diagonal(g, axis1=-2, axis2=-1).real
    positive = ((squares > 0) & jnp.isfinite(squares)).all(-1)
    d = 1 / jnp.sqrt(jnp.where(positive[..., None], squares, 1))
    unit = g * d[..., :, None].astype(g.dtype) * d[..., None, :].astype(g.dtype)
    return where_matrix(positive, unit, identity_like(g)), squares, d, positive


def _implicit_norm(triangle: jax.Array, d: jax.Array, steps: int) -> jax.Array:
    """A bound of ||R^-1|| for `triangle` = R D^-1."""
    scale = d[:, None].astype(triangle.dtype)
    return inverse_norm_bound(
        lambda z: triangular_solve(triangle, z) / scale,
        lambda z: triangular_solve(triangle, z / scale, adjoint=True),
        triangle,
        steps,
    )


def _factor(rows_apart: bool, double: bool, implicit: bool, t: jax.Array) -> Gram:
    """The same, in double precision for a T in single precision or in its own; `implicit`: without R^-1."""
    m, p = t.shape[-2:]
    real = jnp.finfo(t.dtype).dtype
    with double_precision(t.dtype) if double else nullcontext(t.dtype) as wide:
        unit, squares, d, positive = _scaled_product(rows_apart, t, wide)
        eye = identity_like(unit)
        r = H(cholesky(unit))
        definite = positive & jnp.isfinite(jnp.diagonal(r, axis1=-2, axis2=-1).real).all(-1)
        r = where_matrix(definite, r, eye)
        triangle = r / d[..., None, :].astype(wide)
        if implicit:
            x = None
            inverse_norm = loose = _implicit_norm(triangle, d, 2 * _STEPS if double else _STEPS)
            inverse_size = largest(d) * inverse_norm
        else:
            x = inverse(r)
            # The sharper bound costs two products of triangles; single precision has no room for the other.
            sharp = (t.ndim == 2 and m >= 8 * p) or (not double and jnp.finfo(real).bits == 32)
            loose = frobenius(x)
            inverse_norm = norm2_bound(x) if sharp else loose
            x = d[..., :, None].astype(wide) * x
            inverse_size = jnp.minimum(largest(d) * inverse_norm, frobenius(x))
        contraction = _rounding(m, p, squares.dtype) * inverse_norm**2
        if double:
            # R or R^-1 in two numbers of single precision, and substitution or products with it
            contraction = contraction + (1 + p**0.5) * p**0.5 * _LOW * loose
        # ||T|| is at most its Frobenius norm, ||D R^-1|| at most its own and ||D|| ||R^-1||. The default
        # rcond of many rows in single precision needs more.
        size = norm2_bound(triangle) if double and t.ndim == 2 else jnp.sqrt(squares.sum(-1))
        in_working_precision = squares.astype(real)
        accepted = definite & in_range(m, in_working_precision) & (contraction <= _CONTRACTION)
        x, x_low = (None, None) if x is None else _halves(x, t.dtype)
        triangle, triangle_low = _halves(triangle, t.dtype)
        return Gram(
            inverse=x,
            triangle=triangle,
            inverse_low=x_low,
            triangle_low=triangle_low,
            inverse_norm=inverse_norm.astype(real),
            contraction=contraction.astype(real),
            condition=(size * inverse_size).astype(real),
            accepted=accepted,
            squares=in_working_precision,
            precise=jnp.full_like(accepted, double),
        )


class Basis(NamedTuple):
    """An orthonormal basis Q = Z R2^-1 U of the columns of F, where Z is next to orthonormal.

    Q itself would be one more array of its size.
    """

    z: jax.Array  # (*batch, m, p)
    r2: jax.Array  # (*batch, p, p)
    u: jax.Array | None  # (*batch, p, p); None: the identity

    def times(self, c: jax.Array) -> jax.Array:
        """Q c."""
        return mm(self.z, triangular_solve(self.r2, c if self.u is None else mm(self.u, c)))

    def adjoint_times(self, f: jax.Array) -> jax.Array:
        """Q^H f."""
        c = triangular_solve(self.r2, adjoint_times(self.z, f), adjoint=True)
        return c if self.u is None else mm(H(self.u), c)


def orthonormal_basis(
    t: jax.Array, e: jax.Array | None, r: jax.Array, down: jax.Array | None = None
) -> tuple[Basis, jax.Array]:
    """Q and the triangle C, unitary to rounding, with F = Q (C R), as good as from Householder's method.

    F = `down` T E. From R of another factorisation of it, of any condition. E is small, None: the identity;
    its last columns may be zero, and stay so. Never differentiated.
    """
    if t.ndim == 2 and isinstance(t.shape[0], int):
        # Columns of zeros come last, where they meet no rounding errors of others.
        perm = grading(r if e is None else jnp.where((e != 0).any(0), r, 0))
        u, graded = qr(r[:, perm])
        z = _graded_basis(t, (identity_like(r) if e is None else e)[:, perm], graded, down)
        r2 = _next_to_identity(product(z))
        # F = Z graded P^H = Z U^H R
        u, corrections = qr(mm(r2, H(u)))
        return Basis(z, r2, u), corrections
    # Row after row, as XLA multiplies and LAPACK solves F^H; else XLA on CPU copies both to and fro.
    t = scaled(t, down)
    f = lax.optimization_barrier(t if e is None else mm(t, e))
    z = H(triangular_solve(r, H(f), adjoint=True))
    z = lax.optimization_barrier(z.reshape(*z.shape[:-2], z.shape[-2] * z.shape[-1])).reshape(z.shape)
    r2 = _next_to_identity(product(z))
    return Basis(z, r2, None), r2


def within_range(down: jax.Array) -> jax.Array:
    """Whether T of this scale may be scaled by way of a small matrix, whose entries are then not lost."""
    info = jnp.finfo(down.dtype)
    room = float(info.eps) ** 2
    return (down > float(info.tiny) / room) & (down < float(info.max) * room)


def _graded_basis(t: jax.Array, e: jax.Array, r: jax.Array, down: jax.Array | None = None) -> jax.Array:
    """`down` T E R^-1 of one matrix, the rows of R graded.

    Then a product with R^-1 is as good as substitution, which has a small error in every row (Higham,
    Accuracy and Stability, 2002, section 8.1) but takes longer. Where it is not it is corrected, some rows at
    a time.
    """
    x = inverse(r)
    m = t.shape[0]
    # Rows that are sharded over devices stay where they are: the loop takes some of every group.
    groups = min(m & -m, _BLOCK)
    rows = min(_BLOCK // groups, m // groups)
    steps = -(-m // (groups * rows))

    def correct(i, z):
        # The last rows begin earlier rather than being filled up.
        first = jnp.minimum(i % steps * rows, m // groups - rows)
        in_groups = [a.reshape(groups, m // groups, a.shape[1]) for a in (t, z)]
        t_rows, z_rows = (lax.dynamic_slice_in_dim(a, first, rows, 1) for a in in_groups)
        t_rows = t_rows if down is None else t_rows * down.astype(t.dtype)
        better = z_rows + mm(mm(t_rows, e) - mm(z_rows, r), x)
        return lax.dynamic_update_slice_in_dim(in_groups[1], better, first, 1).reshape(z.shape)

    accurate = product_growth(r, x) <= GROWTH
    small = mm(e, x)
    if down is not None:
        # Elsewhere Z begins at zero, and the loop makes all of it.
        within = within_range(down)
        accurate, small = accurate & within, jnp.where(within, small * down.astype(small.dtype), 0)
    count = jnp.where(accurate, 0, _CORRECTIONS)
    return lax.fori_loop(0, count * steps, correct, mm(t, small))


def product_growth(r: jax.Array, r_inverse: jax.Array) -> jax.Array:
    """The backward error T - Z R of Z = T R^-1, a product, over that of substitution, at most.

    Per column, and relative to T's: |T| |R^-1| |R| is small for a diagonal R, for a modest condition number
    and after pivoting, when the rows of R are graded. The error is found to be some ten times smaller.
    """
    norms = column_norms(r)
    norms = jnp.where(norms > 0, norms, 1)
    x, r = abs(r_inverse) * norms[:, None], abs(r) / norms[None]
    return largest(mm(x, r).sum(0)) / r.shape[-1]


def _next_to_identity(gram: jax.Array) -> jax.Array:
    """The Cholesky factor of a Gram matrix that nearly is the identity, but for columns of zeros."""
    empty = jnp.diagonal(gram, axis1=-2, axis2=-1) == 0
    eye = identity_like(gram)
    r2 = H(cholesky(jnp.where(empty[..., None], eye, gram)))
    # Of columns that depend on each other more than R can tell nothing is right, but it is to be finite.
    return where_matrix(jnp.isfinite(r2).all((-2, -1)), r2, eye)


def orthonormalised(z: jax.Array) -> jax.Array:
    """Q of Z = Q R2 for a Z that nearly is orthonormal, but for columns of zeros: its Gram matrix is safe."""
    return mm(z, inverse(_next_to_identity(product(z))))


def _halves(a: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A rounded to single precision, and the rest; itself and None in double precision."""
    high = a.astype(dtype)
    return high, (a - high.astype(a.dtype)).astype(dtype) if jnp.finfo(dtype).bits == 32 else None


def products_suffice(gram: Gram) -> jax.Array:
    """Where products with R^-1 in T's precision are good enough for `orthonormal`."""
    p = gram.triangle.shape[-1]
    rounding = (1 + p**0.5) * p * float(jnp.finfo(gram.triangle.dtype).eps) * gram.inverse_norm
    return gram.accepted & (~gram.precise | (rounding <= _CONTRACTION))


def _harmful(gram: Gram) -> jax.Array:
    """Where the condition number of R1 costs digits in what is only R1 to a product's accuracy."""
    return gram.accepted & (gram.inverse_norm > _HARMLESS)


def _nearly_orthonormal(t: jax.Array, gram: Gram) -> jax.Array:
    """Z = T R1^-1 with a backward error like that of substitution, T = Z R1.

    That of the product with the inverse grows with the condition number; corrected once, it does not.
    """
    harmful = _harmful(gram)
    inverted = inverse(gram.triangle) if gram.inverse is None else gram.inverse

    def correct(_, z):
        return where_matrix(harmful, z + mm(t - mm(z, gram.triangle), inverted), z)

    return lax.fori_loop(0, harmful.any().astype(int), correct, mm(t, inverted))


def triangle(t: jax.Array, gram: Gram) -> jax.Array:
    """R of T, where accepted; with a condition number near one the first R is as good as the second."""
    harmful = _harmful(gram) & ~gram.precise
    if gram.inverse is None:
        # A second pass over T costs more than a sharper bound.
        sharper = _implicit_norm(gram.triangle, 1 / jnp.sqrt(gram.squares), 2 * _STEPS)
        harmful = harmful & (sharper > _HARMLESS)

    def second():
        r = mm(H(cholesky(product(_nearly_orthonormal(t, gram)))), gram.triangle)
        return where_matrix(harmful, r, gram.triangle)

    return cond(harmful.any(), second, lambda: gram.triangle, t)


def orthonormal(t: jax.Array, gram: Gram) -> tuple[jax.Array, jax.Array]:
    """Q and R of T, where accepted."""
    z = _nearly_orthonormal(t, gram)
    r2 = H(cholesky(product(z)))
    return mm(z, inverse(r2)), mm(r2, gram.triangle)
