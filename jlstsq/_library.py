"""The platform's own factorisations, of one matrix or of a batch; never differentiated.

On CPU jaxlib (0.10.0 to 0.11.0) splits a batched LAPACK call among the threads of the pool that
runs the call, and waits for them: as many such calls at once as there are threads wait for each other
for ever. On two cores one program with two independent batched calls is enough. A call with little
work stays in its own thread, so there a batch is a loop over blocks of that size.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import H, native_batch

# jaxlib splits from 200 000 operations on, by a count of its own that is less than this many
# times rows * columns * min(rows, columns).
_SPLIT = 200_000
_COUNT = 40
# Triangles of a batch this small are solved by code of our own.
_TINY = 4


def _in_thread(fun: Callable, *args: jax.Array) -> Any:
    """`fun` over the leading axis of its arguments, in blocks that jaxlib does not split."""
    matrices = args[0].shape[0]
    rows, columns = args[0].shape[-2:]
    widest = max(a.shape[-1] for a in args)
    block = max(1, (_SPLIT - 1) // max(1, _COUNT * rows * widest * min(rows, columns)))
    if not isinstance(matrices, int):  # a symbolic dimension, treated as large
        return lax.map(lambda a: fun(*a), args)
    if matrices <= block:
        return fun(*args)
    return lax.map(lambda a: fun(*a), args, batch_size=block)


def _batched(fun: Callable, columns_out: tuple[bool, ...], matrices: int = 1, gpu: Any = None) -> Callable:
    """`fun`, a function of matrices to a tuple, for leading batch dimensions and a user's vmap.

    `gpu` replaces it on CUDA and ROCm. `matrices` and `columns_out` are those of `native_batch`.
    """
    gpus = {"cuda": gpu, "rocm": gpu} if gpu else {}

    def call(*args):
        batch = args[0].shape[:-2]
        if not batch:
            return lax.platform_dependent(*args, default=fun, **gpus) if gpu else fun(*args)
        flat = [a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in args]
        out = lax.platform_dependent(*flat, cpu=partial(_in_thread, fun), default=fun, **gpus)
        return tuple(x.reshape(*batch, *x.shape[1:]) for x in out)

    return native_batch(call, matrices, columns_out)


def _substitute(r: jax.Array, b: jax.Array, lower: bool, adjoint: bool) -> jax.Array:
    """R^-1 b or R^-H b, unrolled over the rows: a library's call costs more than its work where p is tiny."""
    p = r.shape[-1]
    a = H(r) if adjoint else r
    order = range(p) if lower != adjoint else range(p - 1, -1, -1)
    rows: dict[int, jax.Array] = {}
    for i in order:
        row = b[..., i, :]
        for j, x in rows.items():
            row = row - a[..., i, j, None] * x
        rows[i] = row / a[..., i, i, None]
    return jnp.stack([rows[i] for i in range(p)], axis=-2)


@cache
def _triangular_solve(lower: bool, adjoint: bool) -> Callable:
    def solve(r, b):
        if r.ndim > 2 and r.shape[-1] <= _TINY:
            return (_substitute(r, b, lower, adjoint),)
        x = lax.linalg.triangular_solve(
            r, b, left_side=True, lower=lower, transpose_a=adjoint, conjugate_a=adjoint
        )
        return (x,)

    return _batched(solve, (True,))


def triangular_solve(r: jax.Array, b: jax.Array, *, lower: bool = False, adjoint: bool = False) -> jax.Array:
    """R^-1 b, or R^-H b, for a triangular R."""
    (x,) = _triangular_solve(lower, adjoint)(r, b)
    return x


_triangle = _batched(lambda a: (jnp.linalg.qr(a, mode="r"),), (False,))
_qr = _batched(lambda a: tuple(jnp.linalg.qr(a, mode="reduced")), (False, False))
_cholesky = _batched(lambda a: (lax.linalg.cholesky(a, symmetrize_input=False),), (False,))
_eigh = _batched(lambda a: tuple(jnp.linalg.eigh(a, symmetrize_input=False)), (False, False))
_householder_product = _batched(
    lambda a, taus: (lax.linalg.householder_product(a, taus[..., 0, :]),), (False,), matrices=2
)


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


def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a Hermitian matrix."""
    s, v = _eigh(a)
    return s, v


def householder_product(a: jax.Array, taus: jax.Array) -> jax.Array:
    """Q from Householder vectors below the diagonal of A (*batch, m, n) and taus (*batch, n)."""
    (q,) = _householder_product(a, taus[..., None, :])
    return q


@cache
def _svd(vectors: bool, qr_iteration: bool) -> Callable:
    def decompose(a, algorithm=None):
        out = lax.linalg.svd(a, full_matrices=False, compute_uv=vectors, algorithm=algorithm)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    gpu = partial(decompose, algorithm=lax.linalg.SvdAlgorithm.QR) if qr_iteration else None
    return _batched(decompose, (False,) * (3 if vectors else 1), gpu=gpu)


def svd(a: jax.Array, *, qr_iteration: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s, V^H. On CUDA and ROCm by QR iteration where asked for, else the platform's default."""
    u, s, vh = _svd(True, qr_iteration)(a)
    return u, s, vh


def singular_values(a: jax.Array, *, qr_iteration: bool = False) -> jax.Array:
    """The singular values alone, decreasing."""
    (s,) = _svd(False, qr_iteration)(a)
    return s
