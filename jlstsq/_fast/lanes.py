"""Many small matrices at once, in lanes: the Householder QR of [T, b], and gelsd's decision on its R."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._decompose.certificate import full_rank
from .._lanes import by_size, norms, orthogonalised, over_blocks, reduced, substitute, unit
from .._numerics import abs2, largest, power_of_two, scale_by


class Lanes(NamedTuple):
    """Results with the batch first; arbitrary where T or a column of b is not finite.

    NaN where singular values did not converge.
    """

    solution: jax.Array  # (N, p or m, k)
    residuals: jax.Array  # (N, k), squared norms
    condition: jax.Array  # (N,) a bound of ||T|| ||T^+||
    dependence: jax.Array  # (N,) gels' measure of dependent columns
    rank: jax.Array  # (N,) singular values above the cut; p where not asked for
    singular_values: jax.Array  # (N, p), or zeros where not asked for
    t_finite: jax.Array  # (N,) bool
    b_finite: jax.Array  # (N, k) bool


class Reduced(NamedTuple):
    """T D^-1 = Q R with columns of order one, and what Q makes of b, its columns scaled alike.

    For the adjoint problem R alone is of use.
    """

    r: jax.Array  # (N, p, p)
    c: jax.Array  # (N, p, k), Q^H b
    tail: jax.Array  # (N, k), squared norms of (I - Q Q^H) b
    t_size: jax.Array  # (N, p), D: powers of two
    b_size: jax.Array  # (N, k)


class _Spectrum(NamedTuple):
    """R = U diag(s) V^H truncated at s <= rcond s_1, the batch last."""

    values: jax.Array  # (p, lanes), decreasing
    rank: jax.Array  # (lanes,)
    solution: jax.Array  # (p, k, lanes): V_k s_k^-1 U_k^H c; adjoint: V_k s_k^-2 V_k^H c
    dropped: jax.Array  # (k, lanes), squared norms of what U^H c has beyond the rank
    converged: jax.Array  # (lanes,) bool


def _spectrum(r: jax.Array, c: jax.Array, rcond: jax.Array, adjoint: bool) -> _Spectrum:
    """The SVD of R (p, p, lanes) from R^H U = V diag(s), and c (p, k, lanes) solved for.

    c^H rides along under R^H, and becomes (U^H c)^H. R of order one.
    """
    p = r.shape[0]
    columns = (r if adjoint else jnp.concatenate([r, c], axis=1)).conj()
    columns, converged = orthogonalised(p, columns)
    vs = columns[:, :p]
    s = norms(vs)
    kept = s > (rcond * s.max(0))[None]
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0).astype(r.dtype)
    v = vs * inverse[:, None]
    if adjoint:
        weights = inverse[:, None] * (v.conj()[:, :, None] * c[None]).sum(1)
        weights, dropped = weights * inverse[:, None], jnp.zeros(c.shape[1:], s.dtype)
    else:
        uc = columns[:, p:].conj()
        weights = uc * inverse[:, None]
        dropped = abs2(jnp.where(kept[:, None], 0, uc)).sum(0)
    return _Spectrum(
        by_size(s)[0], kept.sum(0), (v[:, :, None] * weights[:, None]).sum(0), dropped, converged
    )


def _norm(a: jax.Array) -> jax.Array:
    """The Frobenius norm of a (p, p, lanes), not negative and of any scale.

    Scaled by a power of two, whose inverse is a normal number: XLA may multiply by it, and flushes others to
    zero.
    """
    up, down = power_of_two(largest(a, (0, 1)))
    return up * jnp.sqrt(((a * down[None, None]) ** 2).sum((0, 1)))


def _block(adjoint: bool, keep: bool, t: jax.Array, b: jax.Array, rcond: jax.Array | None = None) -> tuple:
    """The results of one block of matrices, T (m, p, lanes) and b (rows, k, lanes); `keep` what is `Reduced`.

    Truncated as gelsd does at `rcond` (lanes,), where it is given.
    """
    p = t.shape[1]
    t, d, t_finite = unit(t)
    b, b_size, b_finite = unit(b)
    w, left = reduced(p, t if adjoint else jnp.concatenate([t, b], axis=1))
    r = w[:, :p]
    eye = jnp.broadcast_to(jnp.eye(p, dtype=r.dtype)[..., None], r.shape)
    inverse = substitute(r, eye)
    columns = jnp.sqrt(abs2(r).sum(0))
    # T = T_s D = size T_s E, E at most one
    size = d.max(0)
    e = d / size[None]
    rows = e[:, None].astype(t.dtype)
    if adjoint:
        # T^+H b = T_s (R_s^H R_s)^-1 E^-1 b / size
        y = substitute(r, substitute(r, b / rows, adjoint=True))
        x = scale_by((t[:, :, None] * y[None]).sum(1), b_size[None], 1 / size[None, None])
        rho = jnp.zeros(b.shape[1:], columns.dtype)
    else:
        # T^+ b = D^-1 R_s^-1 Q^H b
        x = scale_by(substitute(r, w[:, p:]), b_size[None], 1 / d[:, None])
        rho = abs2(left).sum(0)
    kept = Reduced(r, w[:, p:], rho, d, b_size) if keep else ()
    dependence = largest((columns[:, None] * abs(inverse)).sum(0), 0)
    condition = jnp.sqrt(((columns * e) ** 2).sum(0)) * _norm(abs(inverse) / e[:, None])
    rank, s = jnp.full(size.shape, p), jnp.zeros_like(columns)
    if rcond is not None:
        spectrum = _spectrum(r * e.astype(r.dtype)[None], b if adjoint else w[:, p:], rcond, adjoint)
        nan = jnp.where(spectrum.converged, 1, jnp.nan).astype(size.dtype)
        y = spectrum.solution
        if adjoint:
            y = (t[:, :, None] * (rows * y)[None]).sum(1)
        y = scale_by(y, b_size[None], 1 / size[None, None]) * nan[None, None].astype(y.dtype)
        # What is proven to be everything is better by substitution, where columns differ in size.
        full = full_rank(condition, rcond)
        x = jnp.where(full[None, None], x, y)
        rho = rho + jnp.where(full[None], 0, spectrum.dropped)
        rank = jnp.where(full, p, spectrum.rank)
        s = spectrum.values * (size * nan)[None]
    found = Lanes(
        solution=x,
        residuals=rho * b_size * b_size,
        condition=condition,
        dependence=dependence,
        rank=rank,
        singular_values=s,
        t_finite=t_finite.all(0),
        b_finite=b_finite,
    )
    return *found, *kept


def solve(
    adjoint: bool, t: jax.Array, b: jax.Array, rcond: jax.Array | None = None, keep: bool = False
) -> tuple[Lanes, Reduced | None]:
    """T^+ b or T^+H b for T (N, m, p) and b (N, rows, k), and what is to be known of R; R too to `keep` it.

    With `rcond` (N,) as gelsd truncates, and with the singular values.
    """
    thresholds = () if rcond is None else (rcond,)
    out = over_blocks(partial(_block, adjoint, keep), t, b, *thresholds)
    found = len(Lanes._fields)
    return Lanes(*out[:found]), Reduced(*out[found:]) if keep else None
