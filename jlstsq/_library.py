"""The platform's own factorisations, of one matrix or of a batch; never differentiated.

On CPU jaxlib (0.10.0 to 0.11.0) splits a batched LAPACK call among the threads of the pool that
runs the call, and waits for them: as many such calls at once as there are threads wait for each other
for ever. On two cores one program with two independent batched calls is enough. A call with little
work stays in its own thread, so there a batch is a loop over blocks of that size.

On CUDA (seen with cuSOLVER and cuBLAS 13, jaxlib 0.11.2) two defaults are not good enough. The SVD of one
matrix by Jacobi rotations is wrong by p eps (500 eps in float32 at p = 500), that by polar decomposition
by 1e-1 where the matrix is singular; QR iteration is right to a few eps, at about the same time. And the
QR factorisation of a batch squares what is left of columns without rescaling: see `_one_by_one`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _lanes as lanes
from ._numerics import H, cond, identity_like, mm, native_batch, where_matrix
from ._platform import platform_dependent

# jaxlib splits from 200 000 operations on, by a count of its own.
_SPLIT = 200_000
# Triangles of a batch this small are solved by code of our own.
_TINY = 4
# Columns up to which CUDA has an SVD of batches: by Jacobi, right to p eps. QR iteration is a loop there.
_BATCHED_SVD = 32
# Triangles are inverted in blocks of at most this size: of one matrix, and of a batch. Larger ones OpenBLAS
# solves in threads of its own, which wait for a core that XLA's threads hold: 0.5 ms for 50 x 50, not 0.05.
_LEAF = 16
_BATCHED_LEAF = 8


def _in_thread(fun: Callable, count: float, *args: jax.Array) -> Any:
    """`fun` over the leading axis of its arguments, in blocks that jaxlib does not split.

    Its count of operations is at most `count` rows columns min(rows, columns), threefold if complex.
    """
    matrices = args[0].shape[0]
    rows, columns = args[0].shape[-2:]
    widest = args[-1].shape[-1]
    count *= 3 if jnp.iscomplexobj(args[0]) else 1
    if not all(isinstance(d, int) for d in (matrices, rows, columns, widest)):  # symbolic: treated as large
        return lax.map(lambda a: fun(*a), args)
    block = max(1, int((_SPLIT - 1) / max(1, count * rows * widest * min(rows, columns))))
    if matrices <= block:
        return fun(*args)
    return lax.map(lambda a: fun(*a), args, batch_size=block)


def _one_by_one(fun: Callable) -> Callable:
    """`fun` of a batch of complex matrices on CUDA, and of single ones where that made NaN of numbers.

    cuBLAS divides by the norm of a column of which nothing but rounding errors of rounding errors is left,
    as of repeated ones, and this underflows. Real columns only lose orthogonality, of those alone.
    """

    def call(*args):
        out = fun(*args)
        if args[0].ndim == 2 or not jnp.iscomplexobj(args[0]):
            return out
        numbers, made = (
            jnp.stack([jnp.isfinite(a).all((-2, -1)) for a in arrays]).all(0) for arrays in (args, out)
        )
        lost = numbers & ~made

        def again():
            alone = lax.map(lambda a: fun(*a), args)
            return tuple(where_matrix(lost, a, o) for a, o in zip(alone, out, strict=True))

        return cond(lost.any(), again, lambda: out, *args)

    return call


def _batched(
    fun: Callable,
    count: float,
    columns_out: tuple[bool, ...],
    few: Callable | None = None,
    **gpus: Callable,
) -> Callable:
    """`fun`, a function of matrices to a tuple, for leading batch dimensions and a user's vmap.

    `count` is that of `_in_thread`, `columns_out` that of `native_batch`. `cuda` and `rocm` replace `fun`,
    and `few` on CPU that of batches of matrices of few columns (`_lanes`).
    """

    def call(*args):
        batch = args[0].shape[:-2]
        if not batch:
            return platform_dependent(*args, default=fun, **gpus) if gpus else fun(*args)
        flat = [a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in args]
        cpu = few if few is not None and lanes.few(args[0], lanes.SVD) else partial(_in_thread, fun, count)
        out = platform_dependent(*flat, cpu=cpu, default=fun, **gpus)
        return tuple(x.reshape(*batch, *x.shape[1:]) for x in out)

    return native_batch(call, 1, columns_out)


def _substitute(r: jax.Array, b: jax.Array, lower: bool = False, adjoint: bool = False) -> jax.Array:
    """R^-1 b or R^-H b, unrolled over the rows: a library's call costs more than its work where p is tiny."""
    p = r.shape[-1]
    a = H(r) if adjoint else r
    order = range(p) if lower != adjoint else range(p - 1, -1, -1)
    rows: dict[int, jax.Array] = {}
    # A complex division is ten operations, in each of the rows that it is fused into.
    inverse = 1 / jnp.diagonal(a, axis1=-2, axis2=-1) if jnp.iscomplexobj(a) else None
    for i in order:
        row = b[..., i, :]
        for j, x in rows.items():
            row = row - a[..., i, j, None] * x
        rows[i] = row / a[..., i, i, None] if inverse is None else row * inverse[..., i, None]
    return jnp.stack([rows[i] for i in range(p)], axis=-2)


@cache
def _triangular_solve(lower: bool, adjoint: bool, unit: bool) -> Callable:
    def solve(r, b):
        x = lax.linalg.triangular_solve(
            r, b, left_side=True, lower=lower, transpose_a=adjoint, conjugate_a=adjoint, unit_diagonal=unit
        )
        return (x,)

    return _batched(solve, 1, (True,))


def triangular_solve(
    r: jax.Array, b: jax.Array, *, lower: bool = False, adjoint: bool = False, unit_diagonal: bool = False
) -> jax.Array:
    """R^-1 b, or R^-H b, for a triangular R; the other triangle, and a unit diagonal, are not read."""
    if r.ndim > 2 and r.shape[-1] <= _TINY and not unit_diagonal:
        return _substitute(r, b, lower, adjoint)
    (x,) = _triangular_solve(lower, adjoint, unit_diagonal)(r, b)
    return x


def inverse(r: jax.Array) -> jax.Array:
    """R^-1 of an upper triangle, by products: a library's substitution is slower than those.

    The diagonal blocks are inverted, then neighbours are joined: [A, B; 0, D]^-1 has the corner
    -A^-1 B D^-1 (Higham, Accuracy and Stability, 2002, section 14.2).
    """
    p = r.shape[-1]
    batch = r.shape[:-2]
    levels = max(0, math.ceil(math.log2(p / (_BATCHED_LEAF if batch else _LEAF))))
    size = -(-p // 2**levels)
    pad = (size << levels) - p
    if pad:
        r = jnp.pad(r, [(0, 0)] * len(batch) + [(0, pad), (0, pad)])
        r = r + jnp.broadcast_to(jnp.diag((jnp.arange(p + pad) >= p).astype(r.dtype)), r.shape)

    def blocks(step: int, right: int) -> jax.Array:
        """Blocks of the current size at every step-th diagonal place, `right` places off it."""
        first = np.arange(0, r.shape[-1], step * size)
        k = len(batch)
        # One gather: slices of their own would each take time to compile.
        return lax.gather(
            r,
            np.stack([first, first + right * size], -1).astype(np.int32),
            lax.GatherDimensionNumbers((*range(k), k + 1, k + 2), (), (k, k + 1)),
            (*batch, size, size),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    leaves = blocks(1, 0) if levels else r[..., None, :, :]
    x = (_substitute if batch else triangular_solve)(leaves, identity_like(leaves))
    for _ in range(levels):
        pairs = x.reshape(*batch, x.shape[-3] // 2, 2, size, size)
        a, d = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -mm(mm(a, blocks(2, 1)), d)
        bottom = jnp.concatenate([jnp.zeros_like(d), d], axis=-1)
        x = jnp.concatenate([jnp.concatenate([a, corner], axis=-1), bottom], axis=-2)
        size *= 2
    return x[..., 0, :p, :p]


def _qr_of(mode: str) -> Callable:
    def decompose(a):
        out = jnp.linalg.qr(a, mode=mode)
        return (out,) if mode == "r" else tuple(out)

    return decompose


_triangle = _batched(_qr_of("r"), 2, (False,), lanes.triangle, cuda=_one_by_one(_qr_of("r")))
_qr = _batched(_qr_of("reduced"), 4, (False, False), lanes.qr, cuda=_one_by_one(_qr_of("reduced")))
_cholesky = _batched(lambda a: (lax.linalg.cholesky(a, symmetrize_input=False),), 0.34, (False,))
_lu = _batched(lambda a: tuple(lax.linalg.lu(a)[::2]), 0.67, (False, False))
_eigh = _batched(lambda a: tuple(jnp.linalg.eigh(a, symmetrize_input=False)), 40, (False, False), lanes.eigh)


def triangle(a: jax.Array) -> jax.Array:
    """R of A = Q R."""
    (r,) = _triangle(a)
    return r


def qr(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of A = Q R, Q of A's shape where A is tall."""
    q, r = _qr(a)
    return q, r


def cholesky(a: jax.Array) -> jax.Array:
    """The lower triangular L of A = L L^H from A's lower triangle; NaN where A is not positive definite."""
    (l,) = _cholesky(a)  # noqa: E741
    return l


def lu(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L, U in one array and the rows (*batch, m) of A in the order of L U, by partial pivoting."""
    factors, permutation = _lu(a)
    return factors, permutation


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a positive semidefinite Hermitian matrix, in some order."""
    s, v = _eigh(a)
    return s, v


@cache
def _svd(vectors: bool, qr_iteration: bool) -> Callable:
    def decompose(a, algorithm=None):
        out = lax.linalg.svd(a, full_matrices=False, compute_uv=vectors, algorithm=algorithm)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def on_gpu(a):
        by_qr = qr_iteration or a.ndim == 2 or a.shape[-1] > _BATCHED_SVD
        return decompose(a, lax.linalg.SvdAlgorithm.QR if by_qr else None)

    few = lanes.svd if vectors else lanes.singular_values
    return _batched(decompose, 10, (False,) * (3 if vectors else 1), few, cuda=on_gpu, rocm=on_gpu)


def svd(a: jax.Array, *, qr_iteration: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s, V^H. `qr_iteration` for batches of small matrices on CUDA and ROCm as well, where it is slow."""
    u, s, vh = _svd(True, qr_iteration)(a)
    return u, s, vh


def singular_values(a: jax.Array, *, qr_iteration: bool = False) -> jax.Array:
    """The singular values alone, decreasing."""
    (s,) = _svd(False, qr_iteration)(a)
    return s
