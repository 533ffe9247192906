"""What a derivative starts from: the factors of T, the decision on its rank, and the solution.

All of it is constant for the derivative (`_derivative` writes down the equations that are
differentiated), so it is computed as the values are: from one pass over the data, with a user's vmap on
the batch, and on CPU a large batch block by block. Where the Gram matrix of T is likely to be enough no Q
is kept, which would be one more array of T's size to write: what is left is formed from T and R when it is
needed.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _lanes as lanes
from ._blocks import of_matrices
from ._decompose import Cut, certificate, cut, svd, uncut
from ._derivative import Factors
from ._fast import seminormal
from ._numerics import (
    abs2,
    cond,
    identity_like,
    largest_entry,
    native_batch,
    pick,
    power_of_two,
    scaled,
    small,
    transposed,
    where_matrix,
)
from ._operator import Operator, halves
from ._reduce import cholesky, householder, orthonormal, project, squared_residuals, triangle
from ._scaling import column_scales, scale_columns


class Factored(NamedTuple):
    """Factors of `down` T, and the first system solved with them."""

    q: jax.Array | None  # (*batch, p m), `flat`; None: formed from T and R where it is needed
    # (*batch, p, p), the identity where T is not finite; where the Gram matrix is accepted its inverse factor
    r: jax.Array
    cut: Cut
    gram: cholesky.Gram | None  # accepted: enough for every right-hand side, of full rank; or not finite
    up: jax.Array  # (*batch) the scale of T, 1 where the Gram matrix is accepted
    down: jax.Array  # (*batch) and its inverse
    finite: jax.Array  # (*batch) bool
    b_size: tuple[jax.Array, jax.Array]  # (*batch, k), the scale of b and its inverse
    b_finite: jax.Array  # (*batch, k) bool
    # v (*batch, m, k), y (*batch, p, k) and, where g = 0, the squared residuals. Where something is truncated
    # the solution is right, v for the adjoint problem and else y, and the residuals, but nothing else.
    solved: tuple[jax.Array | None, jax.Array, jax.Array | None]

    def factors(self, t: jax.Array) -> Factors:
        """With the differentiable T."""
        return Factors(
            t, self.q, self.r, self.cut, gram=self.gram, halves=halves(self.down), solved=self.solved
        )


def _by_gram(t: jax.Array) -> bool:
    return cholesky.worthwhile(t.shape, t.dtype) and not small(t.shape)


def _factorise(
    driver: str, adjoint: bool, keep: bool, t: jax.Array, rcond: jax.Array, b: jax.Array
) -> Factored:
    """The factors; `keep` the residuals v."""
    b_size, b_finite = column_scales(b)
    b = scale_columns(b, b_size[1], b_finite)

    def decided(q, r, c, v, tail, down, proven):
        """From Q if there is one, R, Q^H b, (I - Q Q^H) b if it is there, and its square; of `down` T."""
        q, turned, decision, y = cut(driver, adjoint, q, r, rcond, finite, proven, c)
        if adjoint:
            # T y is as accurate as Q (Paige 1973).
            return q, turned, decision, (Operator(t, halves(down)).times(y), -y, None)
        rho = squared_residuals(scaled(t, down), b, r, c, tail, y)
        if keep and v is None:
            # With the error of y, and so has what a derivative multiplies it with.
            v = b - Operator(t, halves(down)).times(y)
        return q, turned, decision, (v if keep else None, y, rho)

    if not _by_gram(t):
        largest, finite = largest_entry(t, (-2, -1))
        up, down = power_of_two(largest)
        q, r = orthonormal(scaled(t, down))
        c, v = (b, b) if adjoint else householder.apart(transposed(q, r).mT, b)
        q, r, decision, solution = decided(q, r, c, v, abs2(v).sum(-2), down, jnp.zeros_like(finite))
        return Factored(q, r, decision, None, up, down, finite, b_size, b_finite, solution)

    gram = cholesky.factor(t, rows_apart=adjoint)
    assert gram.inverse is not None
    finite = cholesky.finite(t, gram.squares)
    accepted = gram.accepted
    if driver != "gels":
        accepted = accepted & certificate.full_rank(gram.condition, rcond)
    # Where it is not accepted it is still computed with: nothing in it may overflow.
    accepted = accepted | ~finite
    inverse, gram_r = (where_matrix(accepted, x, identity_like(x)) for x in (gram.inverse, gram.triangle))
    low, r_low = (
        x if x is None else where_matrix(accepted, x, jnp.zeros_like(x))
        for x in (gram.inverse_low, gram.triangle_low)
    )
    gram = gram._replace(
        inverse=inverse, triangle=gram_r, inverse_low=low, triangle_low=r_low, accepted=accepted
    )
    one = jnp.ones(accepted.shape, gram.squares.dtype)

    def by_products():
        if keep:
            v, y, _ = seminormal.augmented(Operator(t), gram, *((None, b) if adjoint else (b, None)))
            return v, y, None if adjoint else abs2(v).sum(-2)
        y, _, rho, _ = seminormal.least_squares(Operator(t), gram, b)
        return None, y, rho

    # A single matrix has no neighbours: where it is not accepted this is not needed.
    solution = by_products() if t.ndim > 2 else None

    def fast():
        return inverse, uncut(driver, inverse), one, one, solution or by_products()

    def careful():
        size = jnp.where(accepted, 1, largest_entry(t, (-2, -1))[0])
        up, down = power_of_two(size)
        threshold = None if driver == "gels" else rcond
        if adjoint:
            r, c, tail = triangle(t, down, threshold), b, b
        else:
            r, c, tail = project(t, b, down, threshold)
        # Not used there but to compute with.
        r = where_matrix(accepted, inverse, r)
        _, r, decision, careful_solution = decided(None, r, c, None, tail, down, accepted)
        if solution is not None:
            careful_solution = jax.tree.map(partial(pick, accepted), solution, careful_solution)
        return r, decision, up, down, careful_solution

    r, decision, up, down, solution = cond(accepted.all(), fast, careful, t, rcond, b)
    return Factored(None, r, decision, gram, up, down, finite, b_size, b_finite, solution)


@cache
def factorise(driver: str, adjoint: bool) -> Callable[..., Factored]:
    """(T, rcond, b) -> `Factored` for T (*batch, m, p) and b of any scale.

    The right-hand sides are b, its columns scaled, for T or for its adjoint.
    """

    def call(t, rcond, b):
        leaf: Any = 0
        low = leaf if jnp.finfo(t.dtype).bits == 32 else None
        gram = cholesky.Gram(*[leaf] * len(cholesky.Gram._fields))
        gram = gram._replace(inverse=None, triangle=None, inverse_low=low, triangle_low=None)
        gram = gram if _by_gram(t) else None
        cut = Cut(*[leaf] * len(Cut._fields))._replace(pivots=leaf if driver == "gelsy" else None)
        # To compute the residuals of many right-hand sides anew costs less than to keep them.
        keep = adjoint or b.shape[-1] <= t.shape[-1]
        solution = leaf if keep else None, leaf, None if adjoint else leaf
        q = None if gram else leaf
        of_columns = (leaf, leaf), leaf, solution
        structure = jax.tree.structure(Factored(q, leaf, cut, gram, leaf, leaf, leaf, *of_columns))

        def leaves(*data):
            out = _factorise(driver, adjoint, keep, *data)
            # A batch's triangles are large: `r` has the one that is needed of each.
            slim = out.gram and out.gram._replace(inverse=None, triangle=None, triangle_low=None)
            return tuple(jax.tree.leaves(out._replace(gram=slim)))

        columns = len(jax.tree.leaves(of_columns))
        columns_out = (False,) * (structure.num_leaves - columns) + (True,) * columns
        # Many right-hand sides make blocks small; lanes are to be filled all the same.
        many = small(t.shape) and not small(b.shape)
        in_blocks = of_matrices(leaves, lanes.LANES if many else None)
        batched = native_batch(in_blocks, 2, columns_out)
        out = jax.tree.unflatten(structure, batched(t, rcond, b))
        return out._replace(gram=out.gram and out.gram._replace(inverse=out.r))

    return call


@cache
def triplets(driver: str) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(T, `Factored`) -> c, s, V of `down` T = U diag(s) V^H; s is zero where T is not finite.

    U is Q c, or where there is no Q the columns of T c, made orthonormal.
    """

    def decompose(t, finite, r, *accepted):
        r = where_matrix(finite, r, jnp.zeros_like(r))
        if not accepted:
            return svd.factors(r, driver)
        by_gram = accepted[0] & finite
        r = where_matrix(by_gram, cholesky.triangle(t, cholesky.factor(t)), r)
        _, s, v = svd.factors(r, driver)
        # T V = U diag(s), where s is not all rounding errors
        some = s > s.shape[-1] * jnp.finfo(s.dtype).eps * s[..., :1]
        inverse = jnp.where(some, 1 / jnp.where(some, s, 1), 0)
        return v * inverse[..., None, :].astype(v.dtype), s, v

    batched = native_batch(of_matrices(decompose), 4, (False,) * 3)

    def call(t, factored):
        accepted = () if factored.gram is None else (factored.gram.accepted,)
        return batched(t, factored.finite, factored.r, *accepted)

    return call
