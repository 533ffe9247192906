"""QR by products, for a T much taller than wide and of any condition number.

A random sketch S T of 4 p rows has a pivoted triangle R1, S T P = Q_s R1, such that Z = T P R1^-1 is
nearly orthonormal: its condition number is about 3, whatever that of T is. Cholesky of its Gram
matrix, R2^H R2, then is as stable as Householder's method, T P = (Z R2^-1) (R2 R1) (rand_cholQR:
Balabanov 2022; Higgins, Szyld, Boman and Yamazaki 2023; CQRRPT: Melnichenko et al. 2023; pivots from
LU: BQRRP, Melnichenko, Murray and others 2025).

Pivoting is what allows an explicit inverse of R1, and so a product instead of substitutions: the rows
of R1 are graded, |R1^-1| |R1| is small, and that is what the backward error T P - Z R1 grows by. Where a
column of the sketch depends on those before it to working precision, its row of R1 is replaced by the
column's norm alone, so that Z holds what the others leave of T's column, over that norm. If this is
rounding, as is measured, the row of R is zero.

The sketch adds rows i, i + d, i + 2 d, ... with random signs (CountSketch: Clarkson and Woodruff
2013): it costs one pass over T. No sketch is good for every T, so Z is tested: the condition number
of its Gram matrix bounds the error of everything that follows. Where it fails, Householder is taken.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._decompose.pivoted_qr import grading
from .._library import cholesky, inverse, qr, triangle, triangular_solve
from .._norms import norm2_bound
from .._numerics import (
    H,
    column_norms,
    hashed,
    identity_like,
    inverse_permutation,
    mm,
    scaled,
    varying,
    where_matrix,
)
from .cholesky import GROWTH, product, product_growth, within_range

_ROWS = 4  # of the sketch, per column of T
# Entries up to which its QR factorisation stays in one thread: OpenBLAS's own wait for XLA's.
_SERIAL = 8000
# Accepted condition number of Z: about 3 is expected, and the bound is p^(1/4) too large.
_LARGEST = 16.0
# Units of rounding, per column of T: a row of R1 that may be nothing, and what is left of a column then.
_NOTHING, _LEFT = 4.0, 2.0
# And the smallest rcond that truncates it in any case.
_TRUNCATED = 50.0


class Preconditioned(NamedTuple):
    """T = Z R1 P^H with Z^H Z = R2^H R2 nearly the identity, and T = Q R."""

    z: jax.Array  # (m, p)
    r2: jax.Array  # (p, p)
    r2_inverse: jax.Array  # (p, p)
    u: jax.Array  # (p, p), unitary: R2 R1 P^H = U R, so Q = Z R2^-1 U
    r: jax.Array  # (p, p)
    accepted: jax.Array  # () bool


def worthwhile(shape: tuple) -> bool:
    """One matrix, so tall that the small factorisations are a small part of the work."""
    m, p = shape[-2:]
    return len(shape) == 2 and isinstance(m, int) and isinstance(p, int) and 8 < p <= 256 and m >= 100 * p


def _signs(rows: int, dtype: Any) -> jax.Array:
    """A fixed pseudo-random sign for every row."""
    return jnp.where(hashed(rows) & 1 == 1, 1, -1).astype(dtype)


def _sketch(t: jax.Array) -> jax.Array:
    """S T, with 4 p rows, or fewer, 3 p at least, where that saves threads."""
    m, p = t.shape
    d = _ROWS * p
    if d > _SERIAL // p >= 3 * p:
        d = _SERIAL // p
    signs = _signs(m, t.dtype)

    def add(i, total):
        rows = lax.dynamic_slice(t, (i * d, 0), (d, p))
        return total + rows * lax.dynamic_slice(signs, (i * d,), (d,))[:, None]

    whole = m // d
    total = lax.fori_loop(0, whole, add, varying(jnp.zeros((d, p), t.dtype), t))
    left = m - whole * d
    return total.at[:left].add(t[whole * d :] * signs[whole * d :, None])


def precondition(
    t: jax.Array, down: jax.Array | None = None, rcond: jax.Array | None = None
) -> Preconditioned:
    """Z, R2 and R of T (m, p), scaled by `down`.

    That is left to the small factors: where the sums of T overflow, they are refused. So are dependent
    columns, but where `rcond` truncates much more than what they have left.
    """
    p = t.shape[-1]
    small = scaled(_sketch(t), down)
    finite = jnp.isfinite(small).all()
    small = where_matrix(finite, small, jnp.zeros_like(small))
    perm = grading(small)
    r1 = triangle(small[:, perm])
    eye = identity_like(r1)
    norms = column_norms(r1)
    rounding = p * float(jnp.finfo(norms.dtype).eps)
    nothing = abs(jnp.diagonal(r1)) <= _NOTHING * rounding * norms
    r1 = jnp.where(nothing[:, None], jnp.diag(jnp.where(norms > 0, norms, 1)).astype(r1.dtype), r1)
    r1_inverse = inverse(r1)
    growth = product_growth(r1, r1_inverse)
    order = inverse_permutation(perm)
    z = mm(t, scaled(r1_inverse[order], down))
    within = True if down is None else within_range(down)
    gram = product(z)
    dependent = (~nothing | (jnp.diagonal(gram).real <= (_LEFT * rounding) ** 2)).all()
    truncated = False if rcond is None else (rcond >= _TRUNCATED * rounding).all()
    dependent = dependent & (truncated | ~nothing.any())
    r2 = H(cholesky(jnp.where(nothing[:, None] | nothing[None], eye, gram)))
    definite = jnp.isfinite(r2).all()
    r2 = where_matrix(definite, r2, eye)
    r2_inverse = inverse(r2)
    condition = norm2_bound(r2) * norm2_bound(r2_inverse)
    u, r = qr(jnp.where(nothing[:, None], 0, mm(r2, r1))[:, order])
    accepted = finite & within & dependent & definite & (condition <= _LARGEST) & (growth <= GROWTH)
    return Preconditioned(z, r2, r2_inverse, u, r, accepted)


def split(f: Preconditioned, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R, Q^H b and (I - Q Q^H) b."""
    c, r = jnp.zeros((f.z.shape[-1], b.shape[-1]), b.dtype), b
    # The second step removes the rounding errors of R2^H R2, which are those of sums of m terms.
    for _ in range(2):
        step = triangular_solve(f.r2, H(mm(H(r), f.z)), adjoint=True)
        c, r = c + step, r - mm(f.z, triangular_solve(f.r2, step))
    return f.r, mm(H(f.u), c), r


def orthonormal(f: Preconditioned) -> tuple[jax.Array, jax.Array]:
    """Q and R."""
    return mm(f.z, mm(f.r2_inverse, f.u)), f.r
