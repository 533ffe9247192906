"""Custom derivatives: a function with another's derivative, and a switch that saves nothing for its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._numerics import varying


def _moving(fun: Callable, primals: Any, tangents: Any) -> tuple[Callable, list, list]:
    """`fun` of the leaves that have a tangent, those leaves, and their tangents.

    A derivative in a constant then costs nothing.
    """
    primals, tree = jax.tree.flatten(primals)
    tangents = tree.flatten_up_to(tangents)
    still = jax.custom_derivatives.SymbolicZero
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, still)]

    def of_moving(*arguments):
        full = list(primals)
        for i, argument in zip(moving, arguments, strict=True):
            full[i] = argument
        return fun(*jax.tree.unflatten(tree, full))

    return of_moving, [primals[i] for i in moving], [tangents[i] for i in moving]


def differentiated_as(differentiable: Callable) -> Callable:
    """Decorator: the function's value, with the derivatives of `differentiable` of the same arguments."""

    def decorate(values: Callable) -> Callable:
        fun = jax.custom_jvp(values)

        def rule(primals, tangents):
            return jax.jvp(*_moving(differentiable, primals, tangents))

        fun.defjvp(rule, symbolic_zeros=True)
        return fun

    return decorate


def _ravel(tree: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """The leaves as one vector, and the way back; `jax.flatten_util`'s fails under strict promotion."""
    leaves, structure = jax.tree.flatten(tree)
    dtype = np.result_type(*(a.dtype for a in leaves))

    def back(z):
        out, start = [], 0
        for a in leaves:
            part = z[start : start + a.size].reshape(a.shape)
            out.append((part if jnp.iscomplexobj(a) else part.real).astype(a.dtype))
            start += a.size
        return jax.tree.unflatten(structure, out)

    return jnp.concatenate([a.astype(dtype).reshape(-1) for a in leaves]), back


def switch(index: jax.Array, branches: Sequence[Callable], *operands: Any) -> Any:
    """`lax.switch` of differentiable functions, whose derivative keeps the operands and nothing else.

    Reverse mode through `lax.switch` saves what any branch may need, zeros for those not taken: here
    that is several arrays of A's size. Instead the tangent y' = L x' is one linear equation with the
    unknowns (y', x'),

        [ I  -L ] [ y' ]   [ 0  ]
        [ 0   I ] [ x' ] = [ x' ],

    whose solution and adjoint solution evaluate the branch that is taken, forwards or backwards, when
    they are needed. Derivatives of higher order are those of the equation.
    """
    # Inside shard_map all of one type: an operand that does not vary has its derivative summed outside.
    index, operands = varying((index, operands))
    return _switch(tuple(branches), index, operands)


def _choose(index: jax.Array, functions: Sequence[Callable], data: Any) -> Any:
    return lax.switch(index, [lambda f=f: varying(f(), data) for f in functions])


# Not a closure over its arguments: JAX keeps the rule for as long as the program.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _switch(branches: tuple[Callable, ...], index: jax.Array, operands: tuple) -> Any:
    return _choose(index, [partial(branch, *operands) for branch in branches], operands)


def _switch_rule(branches, primals, tangents):
    index, operands = primals
    moving = [_moving(branch, operands, tangents[1]) for branch in branches]

    def push(moves):
        forwards = [lambda f=f, at=at: jax.jvp(f, at, moves)[1] for f, at, _ in moving]
        return _choose(index, forwards, operands)

    def pull(cotangents):
        cotangents = varying(cotangents, operands)
        backwards = [lambda f=f, at=at: list(jax.vjp(f, *at)[1](cotangents)) for f, at, _ in moving]
        return _choose(index, backwards, operands)

    out = _switch(branches, index, operands)
    # One array, not a tree: custom_linear_solve fails (jax 0.10.2) where only some leaves move.
    rhs, unravel = _ravel((jax.tree.map(jnp.zeros_like, out), moving[0][2]))

    def add(sign, z):
        y, x = unravel(z)
        return _ravel((jax.tree.map(lambda a, b: a + sign * b, y, push(x)), x))[0]

    def add_adjoint(_, z):
        y, x = unravel(z)
        return _ravel((y, jax.tree.map(jnp.add, x, pull(y))))[0]

    z = lax.custom_linear_solve(lambda z: add(-1, z), rhs, lambda _, z: add(1, z), add_adjoint)
    return out, unravel(z)[0]


_switch.defjvp(_switch_rule, symbolic_zeros=True)
