"""Everything differentiable: the solution, residuals and singular values as exact functions of T, b.

Nothing here differentiates a factorisation. The factors (T = Q R, and what was kept of R) enter as
constants that *solve* linear equations, and the equations are written in terms of T: JAX
differentiates the equations, to any order and in any mode.

1. Full column rank. The residual v = f - T y and the solution y satisfy the augmented system

       [ I    T ] [ v ]   [ f ]          y = T^+ f - (T^H T)^-1 g
       [ T^H  0 ] [ y ] = [ g ]          v = (I - T T^+) f + T^+H g

   (Bjorck 1967). f = b, g = 0 is the least-squares problem; f = 0, g = b makes v = T^+H b the
   minimum-norm solution of T^H v = b, which is the wide problem. Its derivative is the same system
   with right-hand sides f' - T' y, g' - T'^H v: Golub and Pereyra's (1973) formula

       x' = T^+ (b' - T' x) + T^+ T^+H T'^H r,      r = b - T x,   and its adjoint.

2. Truncated. T = T_k + D with T_k = T E w^H: w is an orthonormal basis of the row space of T_k, and
   F = T E = T_k w has full rank, so that F and w are all that is needed of T_k:

       [ I    F ] [ v ]   [ f ]          X = T_k^+ b = w y  (f = b, g = 0)
       [ F^H  0 ] [ y ] = [ g ]          T_k^+H b = v       (f = 0, g = w^H b).

   gelsd, gelss: w are the kept right singular vectors and E = w. gelsy: e selects pivot columns and is
   constant ("at fixed pivots"), B = T e, and T_k = P T with the projector P onto the range of B; then
   E = e j, j = B^+ T w. With e = w for the singular vectors, w spans the range of G e in both cases,
   G = T^H T. Only the space matters. With N_w = I - w w^H and C = w^H G e it moves by

       w' = N_w (G' e + G e') C^-1,     G' = T'^H T + T^H T',

   e' = 0 for gelsy. For gelsd and gelss e' = w', N_w G w' = D^H D w', and w' = Z solves

       Z - D^H D Z K = N_w G' w K,      K = C^-1 = (F^H F)^-1,

   which divides only by 1 - s_j^2 / s_i^2, j dropped and i kept: never by a gap among kept ones.
   gelsy's E moves with j: since B^H (T w - B j) = 0 and B^H T w' = B^H D w' = 0,

       B^H B j' = e^H G' (w - E).

   D = T (I - E w^H) is an expression in T, E and w, applied to vectors and never formed, also where it
   is zero, because its derivative is not: without it the Hessian of a rank-deficient problem is wrong.

3. Weights and ridge. T is W^(1/2) T, and x = (F^H W F + ridge)^-1 F^H W b in the kept basis: s / (s^2 +
   ridge) on every singular value kept. The equations are linear in W and in the ridge,

       [ I       F     ] [ v ]   [ f ]
       [ F^H W  -ridge ] [ y ] = [ g ],

   so nothing passes through a square root and every derivative is right at ridge 0 and weight 0.
   In 2 every adjoint but those of w and e has W behind it: G = T^H W T, and G' has T^H W' T as well.

   All of it holds for a wide T as well, with w in the long space. So weights and ridge for a wide A
   are not stated as an adjoint problem (there W^(1/2) would scale the unknowns). gelsy's pivots are
   rows of A then, E = w, a basis of the range of the pivot rows' adjoint X = w C: w' = N_w X' C^-1.

4. Residuals. rho = r^H W r has rho' = r^H W' r + 2 Re [ (W r)^H (b' - T' x) - (ridge x + D^H W r)^H x' ],
   since T^H W r = ridge x + D^H W r. At full rank D = 0 and nothing noisy multiplies x'.

5. Singular values. s' = Re diag(E), E = U^H T' V. To differentiate that once more, U and V rotate:

       U' = U Omega_U + (T' V - U E) S^-1,     Omega_U,ij = (s_j E_ij + s_i conj(E_ji)) / (s_j^2 - s_i^2)
       V' = V Omega_V + (T'^H U - V E^H) S^-1, Omega_V,ij = (s_i E_ij + s_j conj(E_ji)) / (s_j^2 - s_i^2)

   zero at ties and zeros; the phase of a complex pair goes to U, Omega_U,ii = i Im(E_ii) / s_i. The
   last term of V' is zero where V is square, that of U' where U is. With weights U stands for
   W^(1/2) U = W T V S^-1, and E has 1/2 S^-1 (T V)^H W' T V added.

The system of 1 is solved with the factors, or by products with T and the Cholesky factor of its Gram
matrix, where a bound proves that its corrections converge (`_fast.seminormal`); the equations that are
differentiated are the same. The solution comes with the factors (`_factors`, `solved`), but for a
truncated adjoint problem, and only derivatives are solved for.

Without weights and ridge everything is stated for the tall T; a wide A is T^H, its problem the adjoint.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _library as library
from ._autodiff import choose, linear_solve, where_used
from ._decompose import Cut, Decision, expand, svd
from ._fast import seminormal
from ._library import eigh, qr, triangular_solve
from ._numerics import (
    H,
    abs2,
    any_of,
    cond,
    cond_on_cpu,
    flat,
    identity_like,
    many_terms,
    mm,
    pick,
    transposed,
    varying,
    where_matrix,
)
from ._operator import Halves, Operator
from ._reduce.cholesky import Basis, Gram, orthonormal_basis, orthonormalised
from ._scaling import scale_columns


class Factors(NamedTuple):
    """W^(1/2) T = Q R (its adjoint, where T is wide) with the decision on R.

    T, the weights and the ridge are the differentiable part.
    """

    t: jax.Array  # (*batch, m, n); wide only where there are weights or a ridge
    # (*batch, p m), `flat`; (*batch, p n) where T is wide; None: found from T and R where it is needed
    q: jax.Array | None
    r: jax.Array  # (*batch, p, p)
    decision: Any  # `Decision`, or a `Cut` that tells it
    weights: jax.Array | None = None  # (*batch, m)
    ridge: jax.Array | None = None  # (*batch)
    # (left, r): the kept core is left r, see `core_factors`; not needed where nothing is truncated
    core: tuple[jax.Array, jax.Array] | None = None
    # where it is accepted (plain problems) the seminormal equations are as good as Q
    gram: Gram | None = None
    # of a power of two `down` (*batch): everything else, and all results, are for `down` t in the place of T;
    # 1 where the Gram matrix is accepted
    halves: Halves | None = None
    # (v, y, rho) of the right-hand sides that are solved for, see `_factors.Factored`; v None: f - T y
    solved: tuple[jax.Array | None, jax.Array, jax.Array | None] | None = None

    @property
    def wide(self) -> bool:
        return self.t.shape[-2] < self.t.shape[-1]

    @property
    def plain(self) -> bool:
        return self.weights is None and self.ridge is None

    @property
    def qt(self) -> jax.Array:
        """Q^T."""
        assert self.q is not None
        return transposed(self.q, self.r)


def weigh(weights: jax.Array | None, a: jax.Array) -> jax.Array:
    """W a, rows scaled; a itself without weights."""
    return a if weights is None else weights[..., None].astype(a.dtype) * a


def root(weights: jax.Array | None) -> jax.Array | None:
    """The square roots of the weights: for factors, which are constants, and for values."""
    return None if weights is None else jnp.sqrt(lax.stop_gradient(weights))


class FullRank(NamedTuple):
    """F with full-rank kept columns and its factors: W^(1/2) F = q left r, or [core; sqrt(ridge) I].

    F is an operator in T. Columns that are not kept are zero in F and in q left; r holds the identity
    there (times sqrt(1 + ridge)), and the second equation reads -(1 + ridge) y = g.
    """

    f: Operator  # differentiable
    q: Any  # `flat`, or a `Basis`; None: one is found from F and R where it is needed
    r: jax.Array
    left: jax.Array | None = None  # None: the identity, zero where not kept
    kept: jax.Array | None = None  # (*batch, columns) bool
    weights: jax.Array | None = None
    ridge: jax.Array | None = None
    gram: Gram | None = None  # of F; where it is accepted q is not used

    def constants(self) -> "FullRank":
        return jax.tree.map(lax.stop_gradient, self)

    def project(self, f: jax.Array) -> jax.Array:
        """(q left)^H W^(1/2) f."""
        f = weigh(root(self.weights), f)
        c = self.q.adjoint_times(f) if isinstance(self.q, Basis) else mm(transposed(self.q, self.r).conj(), f)
        return self._where_kept(c) if self.left is None else mm(H(self.left), c)

    def along(self, c: jax.Array) -> jax.Array:
        """Q left c."""
        c = self._where_kept(c) if self.left is None else mm(self.left, c)
        return self.q.times(c) if isinstance(self.q, Basis) else mm(transposed(self.q, self.r).mT, c)

    def _where_kept(self, c: jax.Array) -> jax.Array:
        return c if self.kept is None else jnp.where(self.kept[..., None], c, 0)

    def second(self, y: jax.Array) -> jax.Array:
        """What is subtracted in the second equation: ridge y, and y where it is not kept."""
        out = jnp.zeros_like(y)
        if self.ridge is not None:
            out = self.ridge[..., None, None].astype(y.dtype) * y
        return out if self.kept is None else out + jnp.where(self.kept[..., None], 0, y)

    def normal_solve(self, g: jax.Array) -> jax.Array:
        """(F^H W F + ridge)^-1 g."""
        return triangular_solve(self.r, triangular_solve(self.r, g, adjoint=True))

    def solve(self, f: jax.Array, g: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """(v, y): by products with F where its Gram matrix is enough, else from the factors."""
        if self.gram is None:
            return self._by_factors(f, g)
        gram, accepted = self.gram, self.gram.accepted

        def products():
            # `down` is 1 where that is accepted: to multiply by it would be one more pass over v.
            return seminormal.augmented(self.f._replace(halves=None), gram, f, g)[:2]

        def nothing():
            return jnp.zeros_like(f), self.f.zeros(f, rows=False)

        # A branch that is not taken costs passes over v, and saves passes over T.
        few = f.shape[-1] < self.r.shape[-1]
        needed = any_of(accepted)
        by_products = cond_on_cpu(needed, products, nothing, self.f.t, f) if few else products()

        def otherwise():
            return jax.tree.map(partial(pick, accepted), by_products, self._by_factors(f, g))

        return cond(any_of(~accepted), otherwise, lambda: by_products, self.f.t, f)

    def _by_factors(self, f: jax.Array, g: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Rows of very different weight make q^H W^(1/2) f as inaccurate as the heaviest of them.

        The residual of a first solution does not have this, and one correction brings full accuracy.
        """
        if self.q is None:
            assert self.gram is not None
            # Of those accepted something finite is enough.
            t = where_matrix(self.gram.accepted, jnp.zeros_like(self.f.t), self.f.t)
            q, c = orthonormal_basis(t, None, self.r, self.f.down)
            return self._replace(q=q, r=mm(c, self.r))._by_factors(f, g)
        small = 0 if g is None else triangular_solve(self.r, g, adjoint=True)
        c = self.project(f) - small
        y = triangular_solve(self.r, c)
        if self.weights is None and self.ridge is None:
            v = f - self.along(c)
            if many_terms(f):
                c = self.project(v) - small
                v, y = v - self.along(c), y + triangular_solve(self.r, c)
            return v, y
        v = f - self.f.times(y)
        if self.weights is not None:
            rest = self.second(y) if g is None else g + self.second(y)
            c = self.project(v) - triangular_solve(self.r, rest, adjoint=True)
            y = y + triangular_solve(self.r, c)
            v = f - self.f.times(y)
        return v, y

    def transpose_solve(self, f: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(v, y) of the adjoint system v + W F y = f, F^H v - ridge y = g.

        f need not be a multiple of the weights, so these are the seminormal equations, corrected.
        """
        if self.weights is None:
            return self.solve(f, g)
        y = self.normal_solve(self.f.adjoint_times(f) - g)
        v = f - weigh(self.weights, self.f.times(y))
        y = y + self.normal_solve(self.f.adjoint_times(v) - g - self.second(y))
        return f - weigh(self.weights, self.f.times(y)), y


def augmented(problem: FullRank, f: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(v, y) with v + F y = f and F^H W v - ridge y = g, differentiable to any order.

    In F, W, ridge, f and g.
    """
    constant = problem.constants()

    def matvec(vy):
        v, y = vy
        second = problem.f.adjoint_times(weigh(problem.weights, v)) - problem.second(y)
        return v + problem.f.times(y), second

    def solve(_, fg):
        return constant.solve(*fg)

    def transpose_solve(_, fg):
        return jax.tree.map(jnp.conj, constant.transpose_solve(*jax.tree.map(jnp.conj, fg)))

    return linear_solve(matvec, (f, g), solve, transpose_solve)


@jax.custom_jvp
def solved(problem: FullRank, f: jax.Array, g: jax.Array, v: jax.Array, y: jax.Array):
    """(v, y), found before, as the solution of `augmented`: to solve once more for its derivative is waste.

    Without weights and ridge. And where g = 0, the squared residuals |v|^2.
    """
    return v, y, abs2(v).sum(-2)


def _solved_rule(primals, tangents):
    problem, f, g, *_ = primals
    problem_dot, f_dot, g_dot, *_ = tangents
    v, y, rho = solved(*primals)
    still = jax.custom_derivatives.SymbolicZero
    f_dot, g_dot = (
        jnp.zeros_like(a) if isinstance(a_dot, still) else a_dot for a, a_dot in ((f, f_dot), (g, g_dot))
    )
    t, halves, e = problem.f
    t_dot, _, e_dot = problem_dot.f
    moves = [] if isinstance(t_dot, still) else [Operator(t_dot, halves, e)]
    if e is not None and not isinstance(e_dot, still):
        moves.append(Operator(t, halves, e_dot))
    for moved in moves:  # F' = T' E + T E'
        # -y: to negate what comes back for T' y would be one more pass over it.
        f_dot, g_dot = f_dot + moved.times(-y), g_dot - moved.adjoint_times(v)
    # rho' of section 4 with D = 0, from the f' - T' y that is there: one product less with every v.
    rho_dot, f_dot = where_used(lambda f_dot: 2 * (v.conj() * f_dot).real.sum(-2), f_dot)
    return (v, y, rho), (*augmented(problem, f_dot, g_dot), rho_dot)


solved.defjvp(_solved_rule, symbolic_zeros=True)


def _outside(w: jax.Array, a: jax.Array) -> jax.Array:
    """N_w a = a - w w^H a, zero exactly where w is the identity."""
    return a - mm(w, mm(H(w), a))


def _inverse(matvec: Callable, value: jax.Array) -> jax.Array:
    """The inverse of a small matrix, zero where nothing is kept, of which `value` is known to be it."""
    eye = varying(identity_like(value), value)
    return lax.custom_linear_solve(matvec, eye, lambda _, a: mm(value, a), lambda _, a: mm(value.mT, a))


def _gram_dot(t: Operator, t_dot: Operator, weights, weights_dot, z: jax.Array) -> jax.Array:
    """G' z, G = T^H W T; by G' itself where T is tall, which is smaller than T' z."""
    if t.t.shape[-2] < t.t.shape[-1]:
        t_z = t.times(z)
        inner = weigh(weights, t_dot.times(z))
        if weights is not None:
            inner = inner + weigh(weights_dot, t_z)
        return t_dot.adjoint_times(weigh(weights, t_z)) + t.adjoint_times(inner)
    half = t.adjoint_times(weigh(weights, t_dot.scaled))
    out = half + H(half)
    if weights is not None:
        out = out + t.adjoint_times(weigh(weights_dot, t.scaled))
    return mm(out, z)


def _row_space(d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues of d^H d and their vectors, for a small matrix d or one of few rows or columns."""
    if d.shape[-2] < d.shape[-1]:
        eigenvalues, u = eigh(mm(d, H(d)))
        nonzero = eigenvalues > 0
        scale = jnp.where(nonzero, 1 / jnp.sqrt(jnp.where(nonzero, eigenvalues, 1)), 0)
        return eigenvalues, mm(H(d), u) * scale[..., None, :].astype(u.dtype)
    return eigh(mm(H(d), d))


@jax.custom_jvp
def singular_basis(t, weights, w, inverse, s, kept, eigenvalues, v):
    """w, an orthonormal basis of the kept right singular vectors of W^(1/2) T, as a function of T and W.

    T is an `Operator`, s are its singular values, `inverse` is K, and D^H W D = v diag(eigenvalues) v^H.
    """
    return w


@singular_basis.defjvp
def _singular_basis_rule(primals, tangents):
    t, weights, w, inverse, s, kept, eigenvalues, v = primals
    t_dot, weights_dot = tangents[0]._replace(halves=t.halves), tangents[1]
    w = singular_basis(*primals)

    def squared(z):
        """T^H W T z: no array of T's size that lasts."""
        return t.adjoint_times(weigh(weights, t.times(z)))

    k = _inverse(lambda z: mm(H(w), squared(mm(w, z))), inverse)
    rhs = _outside(w, _gram_dot(t, t_dot, weights, weights_dot, mm(w, k)))

    def matvec(z):
        return z - mm(_outside(w, squared(_outside(w, z))), k)

    # Solved in the basis of the dropped right singular vectors, where D^H W D and K are diagonal.
    ratio = jnp.where(kept[..., None, :], eigenvalues[..., :, None] / (s**2)[..., None, :], 0)
    # Separated by the cut; the floor only keeps a cut through a rounding-level tie finite.
    gap = jnp.maximum(1 - ratio, jnp.finfo(s.dtype).eps)

    def solve(_, a):
        return a + mm(v, mm(H(v), a) * ((1 - gap) / gap).astype(a.dtype))

    def transpose_solve(_, a):
        return solve(None, a.conj()).conj()

    return w, lax.custom_linear_solve(matvec, rhs, solve, transpose_solve)


@jax.custom_jvp
def pivoted_basis(t, weights, w, oblique, e, inverse, b_inverse):
    """The bases w and E of the part of T that the pivot columns e keep, as functions of T and W.

    T is an `Operator`; `inverse` is C^-1 = (w^H T^H W T e)^-1, `b_inverse` (B^H W B)^-1.
    """
    return w, oblique


@pivoted_basis.defjvp
def _pivoted_basis_rule(primals, tangents):
    t, weights, _, _, e, inverse, b_inverse = primals
    t_dot, weights_dot = tangents[0]._replace(halves=t.halves), tangents[1]
    w, oblique = pivoted_basis(*primals)

    def squared(z):
        return t.adjoint_times(weigh(weights, t.times(mm(e, z))))

    c_inverse = _inverse(lambda z: mm(H(w), squared(z)), inverse)
    b_inverse = _inverse(lambda z: mm(H(e), squared(z)), b_inverse)
    both = jnp.concatenate([mm(e, c_inverse), w - oblique], axis=-1)
    for_w, for_j = jnp.split(_gram_dot(t, t_dot, weights, weights_dot, both), 2, axis=-1)
    return (w, oblique), (_outside(w, for_w), mm(e, mm(b_inverse, mm(H(e), for_j))))


@jax.custom_jvp
def range_basis(x, w, kept):
    """w, an orthonormal basis of the range of X (kept columns, the others zero), as a function of X."""
    return w


@range_basis.defjvp
def _range_basis_rule(primals, tangents):
    x, _, kept = primals
    w = range_basis(*primals)
    x_dot = tangents[0]
    both = kept[..., :, None] & kept[..., None, :]
    small = mm(H(w), x)
    q, r = qr(lax.stop_gradient(jnp.where(both, small, identity_like(small))))
    problem = FullRank(Operator(x), flat(lax.stop_gradient(w)), r, jnp.where(kept[..., :, None], q, 0), kept)
    _, c_inverse = augmented(problem, w, jnp.zeros_like(small))
    x_c = mm(x_dot, c_inverse)
    return w, x_c - mm(w, mm(H(w), x_c))


@jax.custom_jvp
def squared_residual(f, b, x, v, w, weights=None, ridge=None):
    """r^H W r for the columns of v = b - T x, F = T E an `Operator`; w and E None: nothing is dropped.

    T^H W v = ridge x + D^H W v.
    """
    return weigh(weights, abs2(v)).sum(-2)


@squared_residual.defjvp
def _squared_residual_rule(primals, tangents):
    f, _, x, v, w, weights, ridge = primals
    f_dot, b_dot, x_dot, _, _, weights_dot, _ = tangents
    t_dot = f_dot._replace(halves=f.halves, e=None)
    weighted = weigh(weights, v)
    inner = (weighted.conj() * (b_dot - t_dot.times(x))).sum(-2)
    if ridge is not None:
        inner = inner - ridge[..., None].astype(x.dtype) * (x.conj() * x_dot).sum(-2)
    out = 2 * inner.real
    if w is not None:

        def along_dropped(x_dot):
            """Re (D^H W v)^H x'."""
            t_v = f._replace(e=None).adjoint_times(weighted)
            d_v = t_v - mm(w, mm(H(f.e), t_v))
            return (d_v.conj() * x_dot).real.sum(-2)

        out = out - 2 * where_used(along_dropped, x_dot)[0]
    if weights is not None:
        out = out + weigh(weights_dot, abs2(v)).sum(-2)
    return squared_residual(*primals), out


def core_factors(
    r: jax.Array, decision: Decision, wide: bool, ridge: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(left, R) of the kept core: R_k = u core w^H, [core; sqrt(ridge) I] = [q1; q2] R.

    left = u q1, so that W^(1/2) T_k w = Q left R without a ridge; for a wide T core^H, left = w q1.
    The ridge touches this small triangle only.
    """
    kept = decision.kept
    core = where_matrix(decision.full, r, kept.l)
    if not wide and ridge is None:
        return kept.u, core
    core = H(core) if wide else core
    outer = kept.w if wide else kept.u
    if ridge is not None:
        diagonal = jnp.sqrt(jnp.maximum(ridge, 0))[..., None, None].astype(r.dtype) * identity_like(r)
        core = jnp.concatenate(jnp.broadcast_arrays(core, diagonal), axis=-2)
    q, small = qr(core)
    q1 = q[..., : r.shape[-1], :]
    if ridge is not None:
        # Under a dominating ridge q1 is small, and the error of q is not: core R^-1 is accurate there.
        core = core[..., : r.shape[-1], :]
        exact = H(triangular_solve(small, H(core), adjoint=True))
        q1 = where_matrix(ridge > abs2(core).sum((-2, -1)), exact, q1)
    return mm(outer, q1), small


class Problem(NamedTuple):
    """The kept part T_k = F w^H, F = T E, ready to be solved with; D = T - T_k."""

    full_rank: FullRank
    w: Any = None  # (*batch, n, p); None: it and E are the identity
    solved: tuple[jax.Array | None, jax.Array, jax.Array | None] | None = None

    @property
    def t(self) -> Operator:
        return self.full_rank.f._replace(e=None)

    @property
    def oblique(self) -> Any:
        """E, not orthogonal for gelsy."""
        return self.full_rank.f.e

    def dropped(self, x: jax.Array) -> jax.Array:
        """D x = T (x - E w^H x)."""
        return self.t.times(x - mm(self.oblique, mm(H(self.w), x)))


def _full(factors: Factors) -> Problem:
    """Nothing truncated, T tall: F = T."""
    t, q, r, decision, weights, ridge, core, gram, halves, solution = factors
    left = None
    if not factors.plain and core is not None:
        left, r = core
    # An element that is truncated, or dependent under gels, must stay finite: its result is
    # replaced, and 0 * inf would reach its gradient all the same.
    regular = decision.full & decision.usable
    r = where_matrix(regular, r, identity_like(r))
    return Problem(FullRank(Operator(t, halves), q, r, left, None, weights, ridge, gram), solved=solution)


def _truncated(driver: str, factors: Factors) -> Problem:
    """The kept part. Tall elements of full rank have w = E = I exactly, and with it F = T."""
    turned = isinstance(factors.decision, Cut)  # then gelsd's R is diag(s) V^H
    if turned:
        factors = factors._replace(decision=lax.stop_gradient(expand(factors.r, factors.decision)))
    t, q, r, decision, weights, ridge, core, gram, halves, _ = factors
    e, r_e, u, l, w, kept = decision.kept  # noqa: E741
    full, wide = decision.full, factors.wide
    data = Operator(t, halves)
    both = kept[..., :, None] & kept[..., None, :]
    spectrum = driver in ("gelsd", "gelss")
    q_of_f: Any = q
    if q is None:
        # T e = Q (C r_e) and T_k w = T e r_e^-1 l. Of full rank e is the identity, and r_e is R.
        assert gram is not None
        some = where_matrix(gram.accepted, jnp.zeros_like(e), e)
        q_of_f, c = orthonormal_basis(*lax.stop_gradient((t, some, r_e, data.down)))
        decision = decision._replace(kept=decision.kept._replace(l=mm(c, l)))
        r = mm(c, r_e)
    if core is None:
        core = core_factors(r, decision, wide)
    left, small = core
    small = where_matrix(decision.usable, small, identity_like(small))

    if spectrum:
        s = abs(jnp.diagonal(l, axis1=-2, axis2=-1))
        if factors.core is None:  # K = diag(s^-2)
            inverse = identity_like(r) * jnp.where(kept, 1 / s / s, 0)[..., None].astype(r.dtype)
        else:
            without = small if ridge is None else core_factors(r, decision, wide)[1]
            inverse = jnp.where(both, FullRank(data, None, without).normal_solve(identity_like(r)), 0)
        basis = mm(factors.qt.mT, u) if wide else w
        if turned:
            sizes, v = svd.of_rows(factors.r)
            dropped = jnp.where(kept, 0, sizes**2), jnp.where(kept[..., None, :], 0, v)
        else:
            # W^(1/2) D = W^(1/2) T N_w = Q R N_w, R^H Q^H N_w where T is wide
            dropped = _row_space(H(_outside(basis, mm(factors.qt.mT, r) if wide else H(r))))
        basis = singular_basis(data, weights, *lax.stop_gradient((basis, inverse, s, kept, *dropped)))
        oblique = basis
    elif wide:
        basis = range_basis(mm(H(t), e), lax.stop_gradient(mm(factors.qt.mT, u)), kept)
        oblique = basis
    else:
        eye = identity_like(r)
        # B = Q u r_e and T_k w = Q u l: C = l^H r_e, and T_k w = B j.
        r_inverse, l_inverse = library.inverse(r_e), library.inverse(l)
        inverse, b_inverse = mm(r_inverse, H(l_inverse)), mm(r_inverse, H(r_inverse))
        j = where_matrix(full, eye, mm(r_inverse, l))
        constants = w, mm(e, j), e, jnp.where(both, inverse, 0), jnp.where(both, b_inverse, 0)
        basis, oblique = pivoted_basis(data, weights, *lax.stop_gradient(constants))
    # Turned, R has the kept part in its first rows, and u is the identity there.
    outer: Any = (q_of_f, small, None if turned else left)
    if wide:
        outer = (flat(left), small, None)
    f = data._replace(e=oblique)
    full_rank = FullRank(f, *outer, kept=kept, weights=weights, ridge=ridge, gram=gram)
    return Problem(full_rank, basis, factors.solved if turned else None)


def with_problem(
    driver: str, fun: Callable[..., Any], factors: Factors, *operands: jax.Array, known: Any = None
) -> Any:
    """`fun` of the kept part and the operands, differentiable in them, in T, the weights and the ridge.

    Its value need not be computed where it is `known`.
    The batch, also that of a user's vmap, takes one branch: that of its worst element. Where nothing is
    truncated the cost is that of a few products with T. But each element is solved as it would be alone.
    """

    def whole(factors, *operands):
        return fun(_full(factors), *operands)

    def truncated(factors, *operands):
        return fun(_truncated(driver, factors), *operands)

    if factors.wide:
        return truncated(factors, *operands)
    rare = None if driver == "gels" else truncated
    return choose(~factors.decision.full, whole, rare, factors, *operands, known=known)


def solve(driver: str, factors: Factors, b: jax.Array, adjoint: bool, *scaling: jax.Array):
    """The solution x = S b for right-hand sides b, and its squared residuals (None, where T is wide).

    Or, adjoint, S^H b (and None).

    S = T_k^+ without a ridge, and S = w (F^H W F + ridge)^-1 F^H W in general. `scaling` is that of
    `scale_columns`: in here no scaled copy of b waits for its derivative.
    """
    wide = factors.wide

    def apply(problem: Problem, b: jax.Array, *scaling):
        b = scale_columns(b, *scaling) if scaling else b
        full_rank, w, found = problem
        weights, f = full_rank.weights, full_rank.f
        zero = f.zeros(b, rows=adjoint)
        # Truncated, the adjoint problem's y is not known.
        if found is not None and (w is None or not adjoint):
            v, y, _ = found
            if w is not None:
                v, y = None, lax.stop_gradient(mm(H(w), y))
            if v is None:
                v = lax.stop_gradient(b - f.times(y))
            v, y, rho = solved(full_rank, *((zero, b) if adjoint else (b, zero)), v, y)
            if w is None:
                return (v, None) if adjoint else (y, rho)
        elif adjoint:
            v, _ = augmented(full_rank, zero, b if w is None else mm(H(w), b))
            return weigh(weights, v), None
        else:
            v, y = augmented(full_rank, b, zero)
        x = y if w is None else mm(w, y)
        if wide:
            return x, None
        if w is not None:
            # D x is zero for the SVD, but not its derivative.
            v = v - problem.dropped(x)
        return x, squared_residual(f, b, x, v, w, weights, full_rank.ridge)

    known = None
    if factors.solved is not None:
        v, y, rho = factors.solved
        known = (v, None) if adjoint else (y, rho)
    return with_problem(driver, apply, factors, b, *scaling, known=known)


def _onto_columns(full_rank: FullRank, rhs: jax.Array) -> jax.Array:
    """F (F^H W F + ridge)^-1 rhs."""
    return augmented(full_rank, full_rank.f.zeros(rhs, rows=True), rhs)[0]


def covariance(driver: str, factors: Factors) -> jax.Array:
    """S W^-1 S^H = N T^H W T N, N = (T^H W T + ridge)^+, of the kept part."""

    def apply(problem: Problem):
        full_rank, w, _ = problem
        v = _onto_columns(full_rank, identity_like(full_rank.r) if w is None else H(w))
        return mm(H(v), weigh(full_rank.weights, v))

    return with_problem(driver, apply, factors)


def leverages(driver: str, factors: Factors) -> jax.Array:
    """The diagonal of F (F^H W F + ridge)^-1 F^H W: how much each right-hand side moves its own fit."""

    def apply(problem: Problem):
        full_rank = problem.full_rank
        eye = identity_like(full_rank.r)
        v = _onto_columns(full_rank, eye)
        return weigh(full_rank.weights, (v * full_rank.f.times(eye).conj()).real).sum(-1)

    return with_problem(driver, apply, factors)


@jax.custom_jvp
def singular_triplets(t, u, s, v, weights=None):
    """W^(1/2) U (m x p), s, V (n x p) of W^(1/2) T = U diag(s) V^H as functions of T and W."""
    return u, s, v


@singular_triplets.defjvp
def _singular_triplets_rule(primals, tangents):
    t, _, _, _, weights = primals
    u, s, v = singular_triplets(*primals)
    t_dot, weights_dot = tangents[0], tangents[4]
    eps = jnp.finfo(s.dtype).eps
    zero = s <= s.shape[-1] * eps * s[..., :1]
    inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, s))
    columns = inverse[..., None, :].astype(v.dtype)
    moved = weigh(weights, mm(t_dot, v))
    e = mm(H(u), mm(t_dot, v))
    if weights is not None:
        t_v = mm(t, v)
        weights_t_v = weigh(weights_dot, t_v)
        half = mm(H(t_v), weights_t_v) * inverse[..., :, None].astype(v.dtype) / 2
        moved, e = moved + weights_t_v, e + half
    diagonal = jnp.diagonal(e, axis1=-2, axis2=-1)
    s_i, s_j = s[..., :, None], s[..., None, :]
    tie = abs(s_j - s_i) <= s.shape[-1] * eps * s[..., :1, None]
    gap = jnp.where(tie, 0, 1 / jnp.where(tie, 1, (s_j - s_i) * (s_j + s_i)))
    to_j, to_i = (gap * s_j).astype(e.dtype), (gap * s_i).astype(e.dtype)
    omega_u = to_j * e + to_i * H(e)
    omega_v = to_i * e + to_j * H(e)
    if jnp.iscomplexobj(t_dot):
        phase = lax.complex(jnp.zeros_like(s), diagonal.imag * inverse)
        omega_u = omega_u + phase[..., None, :] * identity_like(e)
    u_dot = mm(u, omega_u) + (moved - mm(u, e)) * columns
    v_dot = mm(v, omega_v)
    if t.shape[-2] < t.shape[-1]:
        v_dot = v_dot + (mm(H(t_dot), u) - mm(v, mm(H(v), mm(H(t_dot), u)))) * columns
    return (u, s, v), (u_dot, diagonal.real, v_dot)


def singular_values(factors: Factors, c: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """s, for U = Q c, or the columns of T c, made orthonormal in their order, where there is no Q.

    u_i = T v_i / s_i has an error of eps s_1 / s_i in the direction of u_1, in which no u_i may lie.
    """

    def values(factors, c, s, v):
        operator = Operator(factors.t, factors.halves)
        if factors.q is None:
            u = orthonormalised(lax.stop_gradient(operator.times(c)))
        else:
            u = mm(factors.qt.mT, c)
        return singular_triplets(operator.scaled, lax.stop_gradient(u), s, v)[1]

    # Under a vmap over right-hand sides alone the values have no batch, and nor may their derivative.
    factors = factors._replace(solved=None)
    if factors.gram is None:
        return values(factors, c, s, v)
    # U is formed while a derivative is computed.
    return choose(~factors.gram.accepted, values, None, factors, c, s, v)
