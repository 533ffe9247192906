"""Custom derivatives: a function with another's derivative, and a choice that saves nothing for its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._blocks import in_blocks
from ._numerics import any_of, cond, cond_on_cpu, varying


def _moves(primals: Any, tangents: Any) -> tuple[list[int], list]:
    """Which leaves have a tangent, and their tangents: a derivative in a constant then costs nothing."""
    tangents = jax.tree.structure(primals).flatten_up_to(tangents)
    still = jax.custom_derivatives.SymbolicZero
    where = [i for i, t in enumerate(tangents) if not isinstance(t, still)]
    return where, [tangents[i] for i in where]


def _of_moving(fun: Callable, primals: Any, where: list[int]) -> tuple[Callable, list]:
    """`fun` of those leaves, and they."""
    primals, tree = jax.tree.flatten(primals)

    def of_moving(*arguments):
        full = list(primals)
        for i, argument in zip(where, arguments, strict=True):
            full[i] = argument
        return fun(*jax.tree.unflatten(tree, full))

    return of_moving, [primals[i] for i in where]


def differentiated_as(differentiable: Callable) -> Callable:
    """Decorator: the function's value, with the derivatives of `differentiable` of the same arguments."""

    def decorate(values: Callable) -> Callable:
        fun = jax.custom_jvp(values)

        def rule(primals, tangents):
            where, moves = _moves(primals, tangents)
            return jax.jvp(*_of_moving(differentiable, primals, where), moves)

        fun.defjvp(rule, symbolic_zeros=True)
        return fun

    return decorate


def _tied(tree: Any) -> Any:
    """The same arrays, each plus a sum over no elements of all of them: nothing is computed for that."""
    leaves, structure = jax.tree.flatten(tree)
    empty = [lax.slice_in_dim(a[None], 0, 0).sum() for a in leaves]

    def as_dtype(x, a):
        return (x if jnp.iscomplexobj(a) else x.real).astype(a.dtype)

    return jax.tree.unflatten(structure, [sum((as_dtype(x, a) for x in empty), a) for a in leaves])


def linear_solve(matvec: Callable, b: Any, solve: Callable, transpose_solve: Callable) -> Any:
    """`lax.custom_linear_solve` of a tree, of which only some leaves may move: there it fails (jax 0.10.2).

    So all are made to depend on each other: in b, in the solution, in the equation and its adjoint.

    What JAX keeps for the adjoint of `matvec` is what `matvec` closes over. Without the checkpoint it is what
    of `matvec` does not depend on z, every array of every branch, computed with the value and kept for the
    derivative, where nothing but derivatives of higher order asks for it.
    """
    equation = jax.checkpoint(lambda z: _tied(matvec(_tied(z))), prevent_cse=False)
    return _tied(lax.custom_linear_solve(equation, _tied(b), solve, transpose_solve))


def _with_adjoint(zeros: Any, x: Any, linear: Callable, evaluate: Callable, adjoint: Callable) -> tuple:
    """(linear(x), x), whose value `evaluate` finds; `adjoint(y, x)` is x plus the adjoint of y.

    y = L x is one linear equation with the unknowns (y, x),

        [ I  -L ] [ y ]   [ 0 ]
        [ 0   I ] [ x ] = [ x ],

    whose solution and adjoint solution evaluate L and L^T, when they are needed. Derivatives of higher order
    are those of the equation.
    """

    def matvec(z):
        y, x = z
        return jax.tree.map(jnp.subtract, y, linear(x)), x

    def solve(_, z):
        y, x = z
        return jax.tree.map(jnp.add, y, evaluate(x)), x

    def transpose_solve(_, z):
        return z[0], adjoint(*z)

    return linear_solve(matvec, (zeros, x), solve, transpose_solve)


def where_used(linear: Callable, x: Any) -> tuple:
    """(linear(x), x), on CPU without the work of the adjoint where all of the first one's cotangent is zero.

    The x that is returned, used in the place of x, carries the cotangent that this one is added to.
    """
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(linear, x))

    def adjoint(y, to):
        used = any_of(jnp.stack([(a != 0).any() for a in jax.tree.leaves(y)]))

        def added():
            (moved,) = jax.linear_transpose(linear, to)(y)
            return jax.tree.map(jnp.add, to, moved)

        return cond_on_cpu(used, added, lambda: to, y, to)

    return _with_adjoint(zeros, x, linear, linear, adjoint)


def choose(
    flags: jax.Array, common: Callable, rare: Callable | None, *operands: Any, known: Any = None
) -> Any:
    """`rare` of the operands where a flag of the batch is set, else `common`, both differentiable.

    Without a rare one it is `common`. Where the value is `known` only its derivatives are computed.

    The operands have the batch dimensions `flags` (*batch) has. On CPU a large batch goes block by
    block, and each block takes its own branch. The derivative keeps the operands and nothing else:
    reverse mode through `lax.cond` saves what any branch may need, zeros for those not taken, here
    several arrays of A's size. Instead the tangent y' = L x' is the solution of an equation
    (`_with_adjoint`), which evaluates the branch that is taken, forwards or backwards.
    """
    # Inside shard_map all of one type: an operand that does not vary has its derivative summed outside.
    flags, operands = varying((flags, operands))
    # Each is needed in many places below; a jitted one is traced, and differentiated, once.
    return _choose(tuple(jax.jit(f) for f in (common, rare) if f is not None), flags, operands, known)


def _branch(flags: jax.Array, functions: Sequence[Callable], data: Any) -> Any:
    """The common or the rare function of the data, one for the whole batch."""
    common, *others = functions
    if not others:
        return common(*data)
    (rare,) = others
    return cond(any_of(flags), lambda: rare(*data), lambda: common(*data), data)


def _branch_in_blocks(flags: jax.Array, functions: Sequence[Callable], data: Any) -> Any:
    """The same, a large batch in blocks. Not differentiable."""
    leaves, structure = jax.tree.flatten((flags, data))
    structure_out = []

    def chosen(*leaves):
        flags, data = jax.tree.unflatten(structure, leaves)
        out, tree = jax.tree.flatten(_branch(flags, functions, data))
        structure_out[:] = [tree]
        return tuple(out)

    @jax.custom_batching.custom_vmap
    def blocks(flags, *leaves):
        return in_blocks(chosen, flags.shape, flags, *leaves)

    @blocks.def_vmap
    def _(size, in_batched, *leaves):
        if in_batched[0]:  # another matrix each: a batch like any other
            moved = zip(leaves, in_batched, strict=True)
            out = blocks(*(a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in moved))
        else:
            out = jax.vmap(chosen, [0 if m else None for m in in_batched])(*leaves)
        return out, (True,) * len(out)

    out = blocks(*leaves)
    return jax.tree.unflatten(structure_out[0], out)


# Not a closure over its arguments: JAX keeps the rule for as long as the program.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _choose(branches: tuple[Callable, ...], flags: jax.Array, operands: tuple, known: Any) -> Any:
    return _branch_in_blocks(flags, branches, operands) if known is None else known


def _choose_rule(branches, primals, tangents):
    flags, operands, known = primals
    where, moves = _moves(operands, tangents[1])

    def forwards(branch, operands, moves):
        of_moving, at = _of_moving(branch, operands, where)
        return jax.jvp(of_moving, at, moves)[1]

    def backwards(branch, operands, cotangents):
        of_moving, at = _of_moving(branch, operands, where)
        return list(jax.vjp(of_moving, *at)[1](cotangents))

    pushes, pulls = ([partial(way, branch) for branch in branches] for way in (forwards, backwards))
    out = _choose(branches, flags, operands, known)
    rhs = jax.tree.map(jnp.zeros_like, out), moves

    def pushed(branch, x):
        return branch(flags, pushes, (operands, x))

    def pulled(y, x):
        moved = _branch_in_blocks(flags, pulls, (operands, varying(y, operands)))
        return jax.tree.map(jnp.add, x, moved)

    return out, _with_adjoint(*rhs, partial(pushed, _branch), partial(pushed, _branch_in_blocks), pulled)[0]


_choose.defjvp(_choose_rule, symbolic_zeros=True)
