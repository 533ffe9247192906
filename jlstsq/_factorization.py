"""Factor once, use many times: the reusable factorisation, weights, ridge, covariance.

The tall one of W^(1/2) A and its adjoint is reduced to Q R once, and R decides the rank. Everything
else is read off: with R_k = u core w^H and the QR factorisation [core; sqrt(ridge) I] = [q1; q2] r,

    x = V r^-1 U^H W^(1/2) b,      U = Q u q1,  V = w       (tall)
                                   U = w q1,    V = Q u     (wide; core^H in place of core)

filters every kept singular value by s / (s^2 + ridge), and equals T^+ without a ridge. The ridge
touches the small triangle only, so a thousand of them share one reduction.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _arguments as arguments
from . import _derivative as derivative
from ._autodiff import differentiated_as
from ._decompose import Decision, decider, svd
from ._decompose.kept import Kept
from ._library import triangular_solve
from ._numerics import (
    H,
    abs2,
    any_of,
    flat,
    identity_like,
    inverse_permutation,
    largest_entry,
    mm,
    power_of_two,
    real_dtype,
    scale_by,
    varying,
    where_matrix,
)
from ._reduce import graded, orthonormal
from ._result import LstsqResult

Pair = tuple[jax.Array, jax.Array]


def _map(v: derivative.Factors, y: jax.Array, adjoint: bool = False) -> jax.Array:
    """V y or V^H y."""
    kept = v.decision.kept
    if v.wide:
        return mm(H(kept.u), mm(v.qt.conj(), y)) if adjoint else mm(v.qt.mT, mm(kept.u, y))
    return mm(H(kept.w) if adjoint else kept.w, y)


def _core(factors: derivative.Factors) -> Pair:
    """q1, with the basis it is in, and r; the identity for r where gels answers NaN."""
    assert factors.core is not None
    left, small = factors.core
    return left, where_matrix(factors.decision.usable, small, identity_like(small))


def _onto(u: derivative.Factors, f: jax.Array) -> jax.Array:
    """U^H f."""
    left, _ = _core(u)
    return mm(H(left), f if u.wide else mm(u.qt.conj(), f))


def _values(factors: derivative.Factors, b: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The solution, and the squared residuals where T is tall."""
    t, _, r, decision, weights, ridge, *_ = factors
    root = derivative.root(weights)
    left, small = _core(factors)
    f = derivative.weigh(root, b)
    if weights is None and not factors.wide:
        # Q^H b is all that reads large data, and it is the same for every ridge.
        c = mm(factors.qt.conj(), f)

        def general():
            return mm(decision.kept.w, triangular_solve(small, mm(H(left), c)))

        if ridge is None:
            x = lax.cond(any_of(~decision.full), general, lambda: triangular_solve(small, c))
        else:
            x = general()
        return x, abs2(f - mm(factors.qt.mT, c)).sum(-2) + abs2(c - mm(r, x)).sum(-2)
    y = triangular_solve(small, _onto(factors, f))
    x = _map(factors, y)
    if weights is None:
        return x, None
    # Heavy rows leave their rounding errors in U^H W^(1/2) b, not in that of the residual.
    c = _onto(factors, derivative.weigh(root, b - mm(t, x)))
    if ridge is not None:
        c = c - triangular_solve(small, ridge[..., None, None].astype(y.dtype) * y, adjoint=True)
    x = _map(factors, y + triangular_solve(small, c))
    return x, None if factors.wide else derivative.weigh(weights, abs2(b - mm(t, x))).sum(-2)


def _values_adjoint(factors: derivative.Factors, c: jax.Array) -> jax.Array:
    """S^H c = W^(1/2) U r^-H V^H c."""
    left, small = _core(factors)
    y = mm(left, triangular_solve(small, _map(factors, c, adjoint=True), adjoint=True))
    return derivative.weigh(derivative.root(factors.weights), y if factors.wide else mm(factors.qt.mT, y))


def _derivative_solve(driver: str, adjoint: bool, factors: derivative.Factors, b: jax.Array):
    """The differentiable form. A plain wide problem is the adjoint one of the tall T = A^H."""
    if factors.wide and factors.plain:
        factors = factors._replace(t=H(factors.t), core=None)
        adjoint = not adjoint
        x, _ = derivative.solve(driver, factors, b, adjoint)
        return x, None
    return derivative.solve(driver, factors, b, adjoint)


def _solve(driver: str, factors: derivative.Factors, b: jax.Array):
    return differentiated_as(partial(_derivative_solve, driver, False))(_values)(factors, b)


def _solve_adjoint(driver: str, factors: derivative.Factors, c: jax.Array) -> jax.Array:
    def exact(factors, c):
        return _derivative_solve(driver, True, factors, c)[0]

    return differentiated_as(exact)(_values_adjoint)(factors, c)


def _covariance(driver: str, factors: derivative.Factors) -> jax.Array:
    """X X^H, X = V r^-1 q1^H."""

    def values(factors):
        left, small = _core(factors)
        x = _map(factors, triangular_solve(small, H(left)))
        return mm(x, H(x))

    return differentiated_as(partial(derivative.covariance, driver))(values)(factors)


def _leverages(driver: str, factors: derivative.Factors) -> jax.Array:
    """The squared row norms of U."""

    def values(factors):
        left, _ = _core(factors)
        return abs2(left if factors.wide else mm(factors.qt.mT, left)).sum(-1)

    return differentiated_as(partial(derivative.leverages, driver))(values)(factors)


def _trace(driver: str, factors: derivative.Factors) -> jax.Array:
    """The sum of the leverages, from the small triangle."""

    def exact(factors):
        return derivative.leverages(driver, factors).sum(-1)

    def values(factors):
        return abs2(_core(factors)[0]).sum((-2, -1))

    return differentiated_as(exact)(values)(factors)


def _singular_values(driver: str, factors: derivative.Factors) -> jax.Array:
    def values(factors):
        return svd.values(factors.r, driver)

    def exact(factors):
        u, s, v = lax.stop_gradient(svd.factors(factors.r, driver))
        u, v = (v, mm(factors.qt.mT, u)) if factors.wide else (mm(factors.qt.mT, u), v)
        u = derivative.weigh(derivative.root(factors.weights), u)
        return derivative.singular_triplets(factors.t, u, s, v, factors.weights)[1]

    return differentiated_as(exact)(values)(factors)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "matrix", "weights", "ridge", "order", "size", "weight_size", "q", "r", "decision", "core", "valid",
    ],
    meta_fields=["driver", "dtype"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Factorization:
    """The factorisation of a matrix, or of a batch, with its rank decision; see `factorize`.

    A pytree of arrays with A's leading batch dimensions (those of A and the weights): it goes through
    jit, vmap, scan, checkpoint and donation, and can be saved and restored. S below is the map from
    right-hand sides to solutions, S = A^+ without weights and ridge. Every method is jitted and
    differentiable in A, weights and ridge to any order, as `lstsq` is, except for `rank` and
    `condition`. Elements that hold NaN or Inf, a negative weight or ridge, and those in which gels
    found dependent columns, are NaN.
    """

    matrix: jax.Array  # (*batch, m, n), as it was given
    weights: jax.Array | None  # (*batch, m)
    ridge: jax.Array | None  # (*batch)
    order: jax.Array | None  # (*batch, p) with weights: the pivots of T = W^(1/2) A, or its adjoint
    size: Pair  # (*batch) power of two next to W^(1/2) A, and its inverse
    weight_size: Pair | None  # (*batch) power of two next to the largest W^(1/2), and its inverse
    q: jax.Array  # (*batch, p max(m, n)), `flat`, T[:, order] / size = Q R
    r: jax.Array  # (*batch, p, p)
    decision: Decision
    core: Pair  # the kept part of R with the ridge, `core_factors`
    valid: jax.Array  # (*batch) bool
    driver: str
    dtype: Any  # the dtype of results

    @property
    def _wide(self) -> bool:
        return self.matrix.shape[-2] < self.matrix.shape[-1]

    @property
    def _batch(self) -> tuple[int, ...]:
        return self.matrix.shape[:-2]

    @property
    def _nan(self) -> jax.Array:
        """A factor (*batch) that makes results, and their derivatives, NaN where they have to be."""
        good = self.valid & self.decision.usable
        if self.ridge is not None:
            good = good & (self.ridge >= 0) & jnp.isfinite(self.ridge)
        return jnp.where(good, 1, jnp.nan).astype(self.size[0].dtype)

    @property
    def _down(self) -> jax.Array:
        """The inverse of the scale of W^(1/2) A."""
        return self.size[1] if self.weight_size is None else self.size[1] * self.weight_size[1]

    def _ordered(self, x: jax.Array, of: str, undo: bool = False) -> jax.Array:
        """The rows of x, which belong to A's rows or columns (of "m" or "n"), in the factors' order."""
        if self.order is None or (of == "m") != self._wide:
            return x
        order = inverse_permutation(self.order) if undo else self.order
        return jnp.take_along_axis(x, order[..., None], axis=-2)

    def _scaled_weights(self) -> jax.Array | None:
        if self.weights is None or self.weight_size is None:
            return None
        down = self.weight_size[1][..., None]
        return scale_by(self.weights, down, down)

    def _factors(self) -> derivative.Factors:
        """The scaled and permuted problem."""
        a = self.matrix * self.size[1][..., None, None].astype(self.matrix.dtype)
        weights = self._scaled_weights()
        if weights is not None:
            weights = self._ordered(weights[..., None], "m")[..., 0]
        ridge = None if self.ridge is None else self.ridge * self._down * self._down
        a = self._ordered(a, "m") if self._wide else self._ordered(a.mT, "n").mT
        constants = lax.stop_gradient((self.q, self.r, self.decision))
        return derivative.Factors(a, *constants, weights, ridge, lax.stop_gradient(self.core))

    def _cast(self, dtype: Any) -> "Factorization":
        """The same in the dtype that a right-hand side asks for."""
        if dtype == self.matrix.dtype:
            return self

        def cast(a):
            if not jnp.issubdtype(a.dtype, jnp.inexact):
                return a
            return a.astype(dtype if a.dtype == self.matrix.dtype else real_dtype(dtype))

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-2]}
        scalars = {name: fields.pop(name) for name in ("weights", "ridge", "size", "weight_size")}
        fields = jax.tree.map(cast, fields)
        scalars = jax.tree.map(lambda a: a.astype(real_dtype(dtype)), scalars)
        return dataclasses.replace(self, **fields, **scalars)

    def _applied(self, B: Any, name: str, apply: Callable) -> list[jax.Array]:
        """Check B (or C), hand it over as columns (*batch, rows, K), and shape what comes back."""
        B = arguments.check_array(B, name)
        compute, result, _ = arguments.common_dtypes(jnp.zeros((), self.dtype), B)
        here, B = varying((self._cast(compute), B))
        shape = self.matrix.shape
        shape_of = shape if name == "B" else (*self._batch, shape[-1], shape[-2])
        vector = arguments.is_vector(shape_of, B)
        batch = arguments.check_right_hand_side(shape, B, vector, name)
        b = B.astype(compute)
        b = b[..., None] if vector else b
        k = b.shape[-1]
        b, folded = arguments.fold(b, self._batch, batch)
        shaped = []
        for x in apply(here, b):
            x = arguments.unfold(x, self._batch, batch, folded, k)
            columns = x.ndim == len(batch) + 2  # the others are squared norms, which keep their last axis
            x = x.astype(result if columns else jnp.finfo(result).dtype)
            shaped.append(x[..., 0] if vector and columns else x)
        return shaped

    def _fit(self, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The solution and the squared weighted residuals for b (*batch, m, K)."""
        if not self.matrix.size:
            x = jnp.zeros((*self._batch, self.matrix.shape[-1], b.shape[-1]), b.dtype)
            return x, derivative.weigh(self.weights, abs2(b)).sum(-2)
        root = derivative.root(self._scaled_weights())
        _, finite = largest_entry(b, -2)
        largest, _ = largest_entry(derivative.weigh(root, b), -2)
        up, down = power_of_two(largest)
        b = jnp.where(finite[..., None, :], b, 0) * down[..., None, :].astype(b.dtype)
        x, rho = _solve(self.driver, self._factors(), self._ordered(b, "m"))
        x = self._ordered(x, "n", undo=True)
        nan = self._nan[..., None] * jnp.where(finite, 1, jnp.nan).astype(up.dtype)
        if rho is None:
            a = self.matrix * self.size[1][..., None, None].astype(b.dtype)
            rho = derivative.weigh(self._scaled_weights(), abs2(b - mm(a, x))).sum(-2)
        if self.weight_size is not None:
            rho = rho * (self.weight_size[0] * self.weight_size[0])[..., None]
        up, down = jnp.broadcast_arrays(up, self.size[1][..., None])
        x = scale_by(x, up[..., None, :], down[..., None, :]) * nan[..., None, :].astype(x.dtype)
        return x, rho * up * up * nan

    @jax.jit
    def lstsq(self, B: Any) -> LstsqResult:
        """All that `lstsq(A, B)` returns, from this factorisation; shapes and NaN as there."""
        m, n = self.matrix.shape[-2:]
        x, rho = self._applied(B, "B", Factorization._fit)
        none = jnp.zeros((0,), rho.dtype)
        spectrum = self.driver in ("gelsd", "gelss")
        return LstsqResult(
            solution=x,
            residuals=rho if m > n else none,
            rank=jnp.zeros((0,), int) if self.driver == "gels" else self.rank,
            singular_values=self.singular_values.astype(rho.dtype) if spectrum else none,
        )

    @jax.jit
    def solve(self, B: Any) -> jax.Array:
        """X = S B, the solution of the least-squares problem for right-hand sides B.

        Without weights one pass over Q (wide: one over Q as well) and products with p x p matrices;
        with weights three passes more, over A and Q.

        Args:
          B: ``(*batch_b, m, k)``, or a vector, by the rules of `lstsq`. The dtype of the result is the
            common one of A and B, its accuracy that of A's dtype.

        Returns:
          ``(*batch, n, k)``, ``(*batch, n)`` for a vector. NaN or Inf in a column of B: NaN there.

        """
        return self._applied(B, "B", Factorization._fit)[0]

    @jax.jit
    def solve_adjoint(self, C: Any) -> jax.Array:
        """S^H C, A^+H C without weights and ridge: what a gradient in B is made of.

        Args:
          C: ``(*batch_c, n, k)``, or a vector: 1-D, or of shape ``(*batch, n)``.

        Returns:
          ``(*batch, m, k)``, ``(*batch, m)`` for a vector.

        """

        def apply(self, c):
            if not self.matrix.size:
                return [jnp.zeros((*self._batch, self.matrix.shape[-2], c.shape[-1]), c.dtype)]
            largest, finite = largest_entry(c, -2)
            up, down = power_of_two(largest)
            c = jnp.where(finite[..., None, :], c, 0) * down[..., None, :].astype(c.dtype)
            x = _solve_adjoint(self.driver, self._factors(), self._ordered(c, "n"))
            x = self._ordered(x, "m", undo=True)
            nan = self._nan[..., None] * jnp.where(finite, 1, jnp.nan).astype(up.dtype)
            up, down = jnp.broadcast_arrays(up, self.size[1][..., None])
            return [scale_by(x, up[..., None, :], down[..., None, :]) * nan[..., None, :].astype(x.dtype)]

        return self._applied(C, "C", apply)[0]

    @property
    def rank(self) -> jax.Array:
        """The rank that was decided, an integer ``(*batch,)``; min(m, n) for gels, which assumes it."""
        return jnp.where(self.valid, self.decision.rank, 0)

    @property
    @jax.jit
    def singular_values(self) -> jax.Array:
        """All singular values of W^(1/2) A, ``(*batch, min(m, n))``, decreasing, for every driver."""
        if not self.matrix.size:
            return jnp.zeros(self.r.shape[:-1], self.size[0].dtype)
        up = self.size[0] if self.weight_size is None else self.size[0] * self.weight_size[0]
        nan = jnp.where(self.valid, 1, jnp.nan).astype(up.dtype)
        s = _singular_values(self.driver, self._factors())
        return (s * (up * nan)[..., None]).astype(jnp.finfo(self.dtype).dtype)

    @property
    @jax.jit
    def condition(self) -> jax.Array:
        """The condition number that solutions have, ``(*batch,)``; 0 where the rank is 0.

        No estimate: the largest over the smallest kept singular value (under gelsy, the rank-th), each
        sqrt(s^2 + ridge) with a ridge. It costs the singular values of the triangle. No derivative.
        """
        s = lax.stop_gradient(self.singular_values)
        if not s.shape[-1]:
            return jnp.zeros(self._batch, s.dtype)
        if self.ridge is not None:
            s = jnp.hypot(s, jnp.sqrt(lax.stop_gradient(self.ridge))[..., None].astype(s.dtype))
        last = jnp.take_along_axis(s, jnp.maximum(self.rank - 1, 0)[..., None], axis=-1)[..., 0]
        return jnp.where((self.rank > 0) | jnp.isnan(last), s[..., 0] / last, 0)

    @jax.jit
    def pinv(self) -> jax.Array:
        """S as a matrix ``(*batch, n, m)``: A^+ without weights and ridge."""
        p = self.r.shape[-1]
        eye = jnp.broadcast_to(jnp.eye(p, dtype=self.dtype), (*self._batch, p, p))
        return self.solve(eye) if self._wide else H(self.solve_adjoint(eye))

    @jax.jit
    def covariance(self) -> jax.Array:
        """(A^H W A)^+, with a ridge N A^H W A N, N = (A^H W A + ridge)^+; ``(*batch, n, n)``.

        The covariance of the solution over the variance of an observation of weight one.
        """
        n = self.matrix.shape[-1]
        if not self.matrix.size:
            return jnp.zeros((*self._batch, n, n), self.dtype)
        c = _covariance(self.driver, self._factors())
        c = H(self._ordered(H(self._ordered(c, "n", undo=True)), "n", undo=True))
        c = scale_by(c, *(self._down[..., None, None],) * 2)
        return (c * self._nan[..., None, None].astype(c.dtype)).astype(self.dtype)

    def _rows(self) -> jax.Array:
        """The number of rows whose weight is not zero."""
        if self.weights is None:
            return jnp.full(self._batch, self.matrix.shape[-2])
        return (self.weights != 0).sum(-1)

    @jax.jit
    def standard_errors(self, B: Any) -> jax.Array:
        """The standard error of every entry of `solve(B)`, of its shape.

        sqrt(covariance_ii * residuals / degrees of freedom), the degrees of freedom being the rows of
        non-zero weight minus the rank, by the same rank decision as the solution's. NaN where no
        degree of freedom is left. With a ridge it is the spread of the (biased) solution.
        """

        def apply(self, b):
            _, rho = self._fit(b)
            free = self._rows() - self.rank
            variance = jnp.diagonal(self.covariance(), axis1=-2, axis2=-1).real.astype(rho.dtype)
            free = jnp.where(free > 0, free.astype(rho.dtype), jnp.nan)
            return [_sqrt(variance)[..., None] * _sqrt(rho / free[..., None])[..., None, :]]

        errors = self._applied(B, "B", apply)[0]
        return errors.real

    @jax.jit
    def leverages(self) -> jax.Array:
        """The diagonal of W^(1/2) A S W^(-1/2), ``(*batch, m)``: how much a row's own b moves its fit.

        The squared row norms of Q, filtered by s^2 / (s^2 + ridge); they sum up to the rank without a
        ridge, to the effective number of parameters with one.
        """
        if not self.matrix.size:
            return jnp.zeros(self.matrix.shape[:-1], self.size[0].dtype)
        h = self._ordered(_leverages(self.driver, self._factors())[..., None], "m", undo=True)[..., 0]
        return (h * self._nan[..., None]).astype(jnp.finfo(self.dtype).dtype)

    @jax.jit
    def loo_residuals(self, B: Any) -> jax.Array:
        """Leave-one-out residuals (b - A x)_i / (1 - leverage_i), ``(*batch, m, k)`` or ``(*batch, m)``.

        Row i of B minus its prediction by the fit to all other rows, if leaving out a row does not
        change the rank.
        """

        def apply(self, b):
            x, _ = self._fit(b)
            return [(b - mm(self.matrix, x)) / (1 - self.leverages())[..., None].astype(b.dtype)]

        return self._applied(B, "B", apply)[0]

    @jax.jit
    def gcv(self, B: Any) -> jax.Array:
        """The generalised cross-validation score m rho / (m - sum of leverages)^2 of every column of B.

        Shape ``(*batch, k)``, ``(*batch, 1)`` for a vector; m counts rows of non-zero weight, rho is the
        squared weighted residual. Its minimum over the ridge is a good choice of it (Golub, Heath and
        Wahba 1979, Technometrics 21). The leverages come from the small triangle.
        """

        def apply(self, b):
            _, rho = self._fit(b)
            m = self._rows().astype(rho.dtype)
            trace = _trace(self.driver, self._factors()) if self.matrix.size else 0
            return [rho * (m / (m - trace) ** 2)[..., None]]

        return self._applied(B, "B", apply)[0]

    def with_ridge(self, ridge: Any) -> "Factorization":
        """The same factorisation with another ridge (None: without one), at the cost of a p x p QR.

        Under `vmap` over the ridge the reduction of A is shared.
        """
        ridge = arguments.check_ridge(ridge, self._batch, self.matrix.dtype)
        self, ridge = varying((self, ridge))
        if not self.matrix.size:
            return dataclasses.replace(self, ridge=ridge)
        r, decision, wide = self.r, self.decision, self._wide
        scaled = None if ridge is None else lax.stop_gradient(ridge) * self._down * self._down

        def core():
            return derivative.core_factors(r, decision, wide, scaled)

        if wide or ridge is not None:
            factors = core()
        else:
            full = any_of(~decision.full)
            factors = lax.cond(full, core, lambda: (decision.kept.u, r))
        if self.driver == "gels":
            test = r if ridge is None else derivative.core_factors(r, decision, False, scaled)[1]
            usable = decider("gels")(test, jnp.zeros_like(self.size[0]), self.valid).usable
            decision = decision._replace(usable=usable)
        return dataclasses.replace(self, ridge=ridge, decision=decision, core=factors)


def _sqrt(a: jax.Array) -> jax.Array:
    """The square root, with derivative zero at zero."""
    zero = a == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, a)))


@partial(jax.jit, static_argnames=("driver",))
def factorize(
    A: Any, rcond: Any = None, *, driver: str | None = None, weights: Any = None, ridge: Any = None
) -> Factorization:
    """The factorisation behind `lstsq(A, ...)`, to be used for many right-hand sides.

    Householder QR of the tall one of A and A^H (4 m n^2 flops for m > n, twice with weights), the
    driver's rank decision on the triangle. It holds A, Q and some p x p matrices, p = min(m, n).
    Worth it from the second call on: a solve reads Q once. `lstsq` and `solve` agree to rounding, and
    have the same derivatives.

    Args:
      A: ``(*batch_a, m, n)``, as for `lstsq`.
      rcond: as for `lstsq`; it cuts singular values of W^(1/2) A.
      driver: as for `lstsq`.
      weights: ``(*batch_w, m)``, real and not negative; see `lstsq`. The batch dimensions broadcast, and
        ``batch`` is the result.
      ridge: a number, or an array that broadcasts to ``batch``, not negative; see `lstsq`.

    Returns:
      `Factorization`, whose arrays have the leading dimensions ``batch``.

    Raises:
      TypeError, ValueError: as `lstsq`.

    Differentiation:
      Factorise inside the function that is differentiated: derivatives in A, weights and ridge flow
      through every result, to any order. Q and R are constants in this.

    References:
      Bjorck (1996), Numerical Methods for Least Squares Problems, sections 2.4, 2.7, 2.8 and 4.4. Cox
      and Higham (1998), in Numerical Analysis 1997, for rows of different weight.

    Example:
      >>> import numpy as np
      >>> from jlstsq import factorize
      >>> A = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
      >>> b = np.array([1.0, 2.0, 4.0, 4.0])
      >>> factors = factorize(A)
      >>> print(np.asarray(factors.solve(b)).round(3), np.asarray(factors.standard_errors(b)).round(3))
      [1.1 1.1] [0.495 0.265]

    """
    driver = arguments.check_driver(driver)
    A = arguments.check_array(A, "A")
    arguments.check_matrix(A)
    dtypes = arguments.common_dtypes(A)
    a = A.astype(dtypes.compute)
    weights = arguments.check_weights(weights, a.shape, dtypes.compute)
    *batch, m, n = a.shape
    batch = tuple(batch)
    if weights is not None:
        batch = jnp.broadcast_shapes(batch, weights.shape[:-1])
        a = jnp.broadcast_to(a, (*batch, m, n))
        weights = jnp.broadcast_to(weights, (*batch, m))
    rcond = arguments.resolve_rcond(rcond, a.shape, dtypes.compute)
    a, weights, rcond = varying((a, weights, rcond))
    factors = _reduce(driver, dtypes.result, a, weights, rcond)
    return factors.with_ridge(ridge)


def _reduce(driver: str, dtype: Any, a: jax.Array, weights: jax.Array | None, rcond: jax.Array):
    """The factorisation without a ridge, and without `core`."""
    *batch, m, n = a.shape
    p = min(m, n)
    constant, valid = lax.stop_gradient(a), jnp.ones(batch, bool)
    weight_size = order = None
    if weights is not None:
        largest, finite = largest_entry(weights, -1)
        weight_size = power_of_two(jnp.sqrt(largest))
        down = weight_size[1][..., None]
        valid = finite & (weights >= 0).all(-1)
        constant = derivative.weigh(derivative.root(scale_by(weights, down, down)), constant)
    largest, finite = largest_entry(constant, (-2, -1))
    size = power_of_two(largest)
    valid = valid & jnp.isfinite(lax.stop_gradient(a)).all((-2, -1))
    t = constant * size[1][..., None, None].astype(a.dtype)
    t = H(t) if m < n else t
    if not a.size:
        q, r, kept = flat(t), jnp.zeros((*batch, p, p), a.dtype), jnp.zeros((*batch, p), bool)
        decision = Decision(Kept(r, r, r, r, r, kept), jnp.ones(batch, bool), jnp.ones(batch, bool))
    else:
        if weights is None:
            q, r = orthonormal(t)
        else:
            q, r, order = graded.orthonormal(t, valid)
        r = where_matrix(valid, r, identity_like(r))
        decision = decider(driver)(r, rcond, valid)
    if driver != "gels":
        valid = valid & ~jnp.isnan(rcond)
    return Factorization(
        matrix=a, weights=weights, ridge=None, order=order, size=size, weight_size=weight_size,
        q=q, r=r, decision=decision, core=(r, r), valid=valid, driver=driver, dtype=dtype,
    )  # fmt: skip
