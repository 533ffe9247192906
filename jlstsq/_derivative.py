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

2. Truncated. T = T_k + D, and the kept part T_k = B J has full-rank factors: B = T e, the kept
   columns in the basis e, and J. Then T_k^+ = J^+ B^+, two full-rank problems as in 1.

   gelsy: e selects pivot columns and is constant ("at fixed pivots"); J = B^+ T and D = T - B J are
   the solution and the residual of one least-squares problem with T as right-hand sides.
   gelsd, gelss: e = w, the kept right singular vectors; J = w^H, J^+ = w. Only the space they span
   matters. It moves by w' = Z, w^H Z = 0; with N_w = I - w w^H, K = (B^H B)^-1, D = T - B w^H,

       Z - D^H D Z K = N_w (T'^H B^+H + D^H T' w K).

   (With Q L = B, Y the motion of Q: Y L = N (T' w + D Z), Z L^H = N_w (T'^H Q + D^H Y); Y is
   eliminated, and D^H N = D^H.) D is an expression in T and w also where it is zero, because its
   derivative is not: without it the Hessian of a rank-deficient problem is wrong. The equation
   divides only by 1 - s_j^2 / s_i^2, j dropped and i kept: never by a gap among kept ones.

3. Residuals. rho = ||r||^2 has rho' = 2 Re [ r^H (b' - T' x) - (D^H r)^H x' ], since T^H r = D^H r.
   At full rank D = 0 and nothing noisy multiplies x'.

4. Singular values. s' = Re diag(E), E = U^H T' V. To differentiate that once more, U and V rotate:

       U' = U Omega_U + (T' V - U E) S^-1,     Omega_U,ij = (s_j E_ij + s_i conj(E_ji)) / (s_j^2 - s_i^2)
       V' = V Omega_V,                         Omega_V,ij = (s_i E_ij + s_j conj(E_ji)) / (s_j^2 - s_i^2)

   zero at ties and zeros; the phase of a complex pair goes to U, Omega_U,ii = i Im(E_ii) / s_i.

Everything is stated for the tall T; a wide A is T^H, so its problem is the adjoint one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._decompose import Decision
from ._library import eigh, qr, triangular_solve
from ._numerics import H, abs2, any_of, identity_like, mm, where_matrix


class Factors(NamedTuple):
    """T = Q R with the decision on R, and T itself, the only differentiable part."""

    t: jax.Array  # (*batch, m, p)
    q: jax.Array  # (*batch, m, p)
    r: jax.Array  # (*batch, p, p)
    decision: Decision


def _augmented_solve(q: jax.Array, r: jax.Array, f: jax.Array, g: jax.Array):
    """The solution (v, y) of the augmented system from B = Q R."""
    c = mm(H(q), f) - triangular_solve(r, g, adjoint=True)
    return f - mm(q, c), triangular_solve(r, c)


def augmented(
    b: jax.Array, q: jax.Array, r: jax.Array, f: jax.Array, g: jax.Array, kept: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(v, y) with v + B y = f and B^H v = g, differentiable in B, f and g to any order.

    Columns of B and Q that are not kept are zero; there the second equation reads -y = g, so that
    the system stays regular, and r holds the identity.
    """
    q, r = lax.stop_gradient((q, r))
    m = f.shape[-2]

    def matvec(vy):
        v, y = vy[..., :m, :], vy[..., m:, :]
        second = mm(H(b), v)
        if kept is not None:
            second = second - jnp.where(kept[..., None], 0, y)
        return jnp.concatenate([v + mm(b, y), second], axis=-2)

    def solve(_, fg):
        return jnp.concatenate(_augmented_solve(q, r, fg[..., :m, :], fg[..., m:, :]), axis=-2)

    # The system is Hermitian, so its transpose is its conjugate.
    def transpose_solve(_, fg):
        return solve(None, fg.conj()).conj()

    # One array, not a pair: custom_linear_solve fails (jax 0.10.2) where only f or only g moves.
    vy = lax.custom_linear_solve(matvec, jnp.concatenate([f, g], axis=-2), solve, transpose_solve)
    return vy[..., :m, :], vy[..., m:, :]


@jax.custom_jvp
def kept_basis(t: jax.Array, q: jax.Array, w: jax.Array, r: jax.Array, kept: jax.Array) -> jax.Array:
    """w, an orthonormal basis of the kept right singular vectors of T, as a function of T.

    T w = q r with r diagonal.
    """
    return w


@kept_basis.defjvp
def _kept_basis_rule(primals, tangents):
    t, q, w, r, kept = primals
    t_dot = tangents[0]
    w = kept_basis(*primals)
    columns = kept[..., None, :]
    b = mm(t, w)
    d = t - mm(b, H(w))
    b_pinv_h, k = augmented(b, q, r, jnp.zeros_like(b), identity_like(w), kept)
    k = jnp.where(columns, -k, 0)

    def project(a):  # N_w a
        return a - mm(w, mm(H(w), a))

    rhs = project(mm(H(t_dot), b_pinv_h) + mm(H(d), mm(t_dot, mm(w, k))))

    def matvec(z):
        return z - mm(project(mm(H(d), mm(d, z))), k)

    # Solved in the basis of all right singular vectors, where D^H D and K are diagonal.
    d0, s = lax.stop_gradient((d, jnp.diagonal(r, axis1=-2, axis2=-1).real))
    eigenvalues, v = eigh(mm(H(d0), d0))
    ratio = jnp.where(columns, eigenvalues[..., :, None] / (s**2)[..., None, :], 0)
    # Separated by the cut; the floor only keeps a cut through a rounding-level tie finite.
    gap = jnp.maximum(1 - ratio, jnp.finfo(s.dtype).eps)

    def solve(_, a):
        return mm(v, mm(H(v), a) / gap.astype(a.dtype))

    def transpose_solve(_, a):
        return solve(None, a.conj()).conj()

    return w, lax.custom_linear_solve(matvec, rhs, solve, transpose_solve)


@jax.custom_jvp
def squared_residual(t, f, x, v, d):
    """The squared column norms of v = f - T x; D^H v = T^H v, D the dropped part of T (None: zero)."""
    return abs2(v).sum(-2)


@squared_residual.defjvp
def _squared_residual_rule(primals, tangents):
    t, f, x, v, d = primals
    t_dot, f_dot, x_dot, _, _ = tangents
    inner = (v.conj() * (f_dot - mm(t_dot, x))).sum(-2)
    if d is not None:
        inner = inner - (mm(H(d), v).conj() * x_dot).sum(-2)
    return squared_residual(t, f, x, v, d), 2 * inner.real


def _solve_full(factors: Factors, b: jax.Array, adjoint: bool):
    """X = T^+ b and its squared residuals, or T^+H b, where nothing is truncated."""
    t, q, r, decision = factors
    # An element that is truncated, or dependent under gels, must stay finite: its result is
    # replaced, and 0 * inf would reach its gradient all the same.
    regular = decision.full & decision.usable
    r = where_matrix(regular, r, identity_like(r))
    if adjoint:
        zero = jnp.zeros((*t.shape[:-1], b.shape[-1]), t.dtype)
        return augmented(t, q, r, zero, b)[0], None
    v, y = augmented(t, q, r, b, jnp.zeros((*t.shape[:-2], t.shape[-1], b.shape[-1]), t.dtype))
    return y, squared_residual(t, b, y, v, None)


def _solve_truncated(driver: str, factors: Factors, b: jax.Array, adjoint: bool):
    """X = T_k^+ b = J^+ B^+ b and its squared residuals, or T_k^+H b = B^+H J^+H b.

    Elements of full rank have e = w = I exactly, and the same arithmetic as `_solve_full`.
    """
    t, q, _, decision = factors
    e, r, u, _, w, kept = decision.kept
    p, k = t.shape[-1], b.shape[-1]
    batch = t.shape[:-2]
    q = mm(q, u)

    def zeros(rows, columns):
        return jnp.zeros((*batch, rows, columns), t.dtype)

    if driver == "gelsy":
        base = mm(t, e)
        d, j = augmented(base, q, r, t, zeros(p, p), kept)
        j = where_matrix(decision.full, identity_like(j), j)
        d = where_matrix(decision.full, jnp.zeros_like(d), d)
        # J^H is p x p: its own QR factorisation solves with it.
        jh = H(j)
        jq, jr = qr(lax.stop_gradient(jh))
        jr = jnp.where(kept[..., :, None] & kept[..., None, :], jr, identity_like(jr))
        jq = jnp.where(kept[..., None, :], jq, 0)
        if adjoint:
            _, y = augmented(jh, jq, jr, b, zeros(p, k), kept)
            return augmented(base, q, r, zeros(t.shape[-2], k), y, kept)[0], None
        v, c = augmented(base, q, r, b, zeros(p, k), kept)
        x, _ = augmented(jh, jq, jr, zeros(p, k), c, kept)
    else:
        w = kept_basis(t, *lax.stop_gradient((q, w, r)), kept)
        base = mm(t, w)
        d = t - mm(base, H(w))
        if adjoint:
            return augmented(base, q, r, zeros(t.shape[-2], k), mm(H(w), b), kept)[0], None
        v, y = augmented(base, q, r, b, zeros(p, k), kept)
        x = mm(w, y)
    # D x is zero for the SVD, but not its derivative.
    return x, squared_residual(t, b, x, v - mm(d, x), d)


def solve(driver: str, factors: Factors, b: jax.Array, adjoint: bool):
    """The solution for right-hand sides b, and its squared residuals (None for the adjoint problem).

    One branch for the whole batch, also under a user's vmap: without truncation the cost is that of
    a few products with T.
    """
    if driver == "gels":
        return _solve_full(factors, b, adjoint)
    return lax.cond(
        any_of(~factors.decision.full),
        lambda: _solve_truncated(driver, factors, b, adjoint),
        lambda: _solve_full(factors, b, adjoint),
    )


@jax.custom_jvp
def singular_triplets(t: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array):
    """U (m x p), s, V of T = U diag(s) V^H as functions of T."""
    return u, s, v


@singular_triplets.defjvp
def _singular_triplets_rule(primals, tangents):
    u, s, v = singular_triplets(*primals)
    t_dot = tangents[0]
    t_v = mm(t_dot, v)
    e = mm(H(u), t_v)
    diagonal = jnp.diagonal(e, axis1=-2, axis2=-1)
    s_i, s_j = s[..., :, None], s[..., None, :]
    eps = jnp.finfo(s.dtype).eps
    tie = abs(s_j - s_i) <= s.shape[-1] * eps * s[..., :1, None]
    gap = jnp.where(tie, 0, 1 / jnp.where(tie, 1, (s_j - s_i) * (s_j + s_i)))
    zero = s <= s.shape[-1] * eps * s[..., :1]
    inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, s))
    to_j, to_i = (gap * s_j).astype(e.dtype), (gap * s_i).astype(e.dtype)
    omega_u = to_j * e + to_i * H(e)
    omega_v = to_i * e + to_j * H(e)
    if jnp.iscomplexobj(t_dot):
        phase = lax.complex(jnp.zeros_like(s), diagonal.imag * inverse)
        omega_u = omega_u + phase[..., None, :] * jnp.eye(s.shape[-1], dtype=e.dtype)
    u_dot = mm(u, omega_u) + (t_v - mm(u, e)) * inverse[..., None, :].astype(u.dtype)
    return (u, s, v), (u_dot, diagonal.real, mm(v, omega_v))
