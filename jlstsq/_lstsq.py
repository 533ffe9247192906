"""The call: check, scale, reduce, decompose, apply; wide problems as the adjoint of tall ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _arguments as arguments
from . import _derivative as derivative
from ._autodiff import differentiated_as
from ._factorization import factorize
from ._factors import factorise, triplets
from ._numerics import H, abs2, varying
from ._result import LstsqResult
from ._scaling import Scales, good, unscale
from ._sharding import automatic, explicit_mesh
from ._values import values


@partial(jax.jit, static_argnames=("driver",))
def lstsq(
    A: Any,
    B: Any,
    rcond: Any = None,
    *,
    driver: str | None = None,
    weights: Any = None,
    ridge: Any = None,
) -> LstsqResult:
    """Least-squares solutions of A X = B by one of LAPACK's four methods, differentiable to any order.

    X minimises ||A X - B||_F, and of all minimisers it has the smallest norm. The tall one of A and
    A^H is reduced to a triangle once (2 m n^2 flops for m > n); the driver decides its rank:

    - ``gels``: none, A has full rank. A matrix whose columns (rows, if wide) depend on each other
      to working precision has the solution NaN.
    - ``gelsy`` (default): column-pivoted QR, a rank estimate, complete orthogonal factorisation.
    - ``gelsd``, ``gelss``: singular value decomposition; they differ in the SVD of
      batches of small matrices on CUDA and ROCm (by Jacobi rotations, right to about 4 eps a column, or
      by QR iteration, slow).

    Args:
      A: ``(*batch_a, m, n)``, real, complex, integer or bool. Half precision is computed in float32.
      B: ``(*batch_b, m, k)``, or a vector: 1-D, or exactly of shape ``A.shape[:-1]``. The batch
        dimensions broadcast.
      rcond: singular values at most ``rcond`` times the largest count as zero. A number, or an array
        that broadcasts to ``batch_a``. None: ``eps * max(m, n)`` (eps, where that reaches 1).
        Negative: eps. 1 or more: everything counts as zero. gels ignores it.
      weights: ``(*batch_w, m)``, real and not negative: X minimises the sum of w_i |A X - B|_i^2.
        ``batch_a`` is then the broadcast of A's batch and the weights'; rank and singular values are
        those of W^(1/2) A, the residuals weighted. Rows of weight zero do not count (but NaN in
        them does), except that the default rcond knows all m rows.
      ridge: a number, or an array that broadcasts to ``batch_a``, not negative: ridge ||X||^2 is added.
        rcond truncates first; every singular value kept is filtered by s / (s^2 + ridge). The residuals
        are without that penalty. A negative or non-finite weight or ridge gives NaN in its element.
      driver: one of the four names in any case; None is gelsy on every platform.

    Returns:
      `LstsqResult`: ``solution (*batch, n, k)``; ``residuals (*batch, k)``, squared 2-norms of the
      columns of A X - B for any rank, ``(0,)`` where m <= n; ``rank batch_a``, ``(0,)`` for gels;
      ``singular_values (*batch_a, min(m, n))``, decreasing, ``(0,)`` for gels and gelsy. A vector B
      gives ``solution (*batch, n)`` and ``residuals (*batch, 1)``. NaN or Inf in a matrix makes its
      own results NaN and its rank 0; in a column of B, that column's.

    Raises:
      TypeError: A or B is no array of numbers, or rcond no real number or array.
      ValueError: shapes that do not fit, or an unknown driver. Both while tracing, never from data.

    Differentiation:
      `solution`, `residuals` and `singular_values` are differentiable in A, B, weights and ridge (also
      at 0), in every mode and order, at the rank that was decided; `rank` and `rcond` have no
      derivative. gelsy's is taken at fixed pivots. `jax.grad` of a complex function is the conjugate of
      PyTorch's.

    References:
      Golub (1965), Numer. Math. 7. LAPACK Users' Guide (1999), section 2.4.2. Golub and Pereyra
      (1973), SIAM J. Numer. Anal. 10, for the derivative.

    Example:
      >>> import numpy as np
      >>> from jlstsq import lstsq
      >>> A = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> result = lstsq(A, np.array([1.0, 2.0, 4.0]))
      >>> print(np.asarray(result.solution).round(3), int(result.rank))
      [0.833 1.5  ] 2

    """
    driver = arguments.check_driver(driver)
    A, B = arguments.check_array(A, "A"), arguments.check_array(B, "B")
    arguments.check_matrix(A)
    dtypes = arguments.common_dtypes(A, B)
    mesh = explicit_mesh(A, B, rcond, weights, ridge)
    if mesh is not None:
        return _on_explicit_mesh(mesh, driver, A, B, weights, rcond, ridge)
    if weights is not None or ridge is not None:
        A = A.astype(dtypes.result)
        return factorize(A, rcond, driver=driver, weights=weights, ridge=ridge).lstsq(B)
    vector = arguments.is_vector(A.shape, B)
    batch = arguments.check_right_hand_side(A.shape, B, vector)
    a, b = A.astype(dtypes.compute), B.astype(dtypes.compute)
    rcond = arguments.resolve_rcond(rcond, a.shape, dtypes.compute)
    # Inside shard_map, where only one of them is sharded, all results vary as if all were.
    a, b, rcond = varying((a, b, rcond))

    *batch_a, m, n = a.shape
    batch_a = tuple(batch_a)
    b = b[..., None] if vector else b
    k = b.shape[-1]
    b, folded = arguments.fold(b, batch_a, batch)
    wide = m < n
    t = H(a) if wide else a
    solve = partial(_solve, driver) if t.size else _solve_empty
    x, rho, rank, s = solve(wide, t, b, rcond)

    x = arguments.unfold(x, batch_a, batch, folded, k).astype(dtypes.result)
    real = jnp.finfo(dtypes.result).dtype
    none = jnp.zeros((0,), real)
    if m > n and rho is not None:
        rho = arguments.unfold(rho, batch_a, batch, folded, k).astype(real)
    return LstsqResult(
        solution=x[..., 0] if vector else x,
        residuals=rho if m > n and rho is not None else none,
        rank=jnp.zeros((0,), int) if driver == "gels" else rank,
        singular_values=s.astype(real) if driver in ("gelsd", "gelss") else none,
    )


def _on_explicit_mesh(mesh: Any, driver: str, A, B, weights, rcond, ridge) -> LstsqResult:
    def call(A, B, weights, rcond, ridge):
        return lstsq(A, B, rcond, driver=driver, weights=weights, ridge=ridge)

    given = A, B, weights, rcond, ridge
    without = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), given)
    shapes = jax.eval_shape(call, *without)
    batch = jnp.broadcast_shapes(A.shape[:-2], () if weights is None else weights.shape[:-1])
    vector = arguments.is_vector((*batch, *A.shape[-2:]), B)
    return automatic(call, mesh, shapes, vector, *given)


def _differentiable(driver: str, wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """The same as `values`, written so that JAX can differentiate it to any order."""
    factored = lax.stop_gradient(factorise(driver, wide)(*lax.stop_gradient((t, rcond, b))))
    factors = factored.factors(t)
    x, rho = derivative.solve(driver, factors, b, wide, factored.b_size[1], factored.b_finite)
    scales = Scales((factored.up, factored.down), factored.b_size, factored.finite, factored.b_finite)
    s = jnp.zeros(factored.r.shape[:-1], factored.up.dtype)
    if driver in ("gelsd", "gelss"):
        vectors = lax.stop_gradient(triplets(driver)(lax.stop_gradient(t), factored))
        s = derivative.singular_values(factors, *vectors)
    solved = good(driver, scales, rcond, factored.cut.usable)
    return unscale(scales, x, rho, factored.cut.rank, s, solved)


def _solve_empty(wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """The same where T has no entries: x = 0, rank 0, and the residual is B."""
    x = jnp.zeros((*t.shape[:-2], t.shape[-2 if wide else -1], b.shape[-1]), t.dtype)
    rho = abs2(b).sum(-2)
    return x, rho, jnp.zeros(t.shape[:-2], int), jnp.zeros((*t.shape[:-2], t.shape[-1]), rho.dtype)


def _solve(driver: str, wide: bool, t: jax.Array, b: jax.Array, rcond: jax.Array):
    """T^+ b (tall) or T^+H b (wide) for T (*batch, m, p), b (*batch, m or p, k), rcond (*batch)."""

    @differentiated_as(partial(_differentiable, driver, wide))
    def solve(t, b, rcond):
        x, rho, rank, s = values(driver, wide)(t, rcond, b)
        return x, None if wide else rho, rank, s

    return solve(t, b, rcond)
