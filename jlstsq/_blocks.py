"""A large batch on CPU: for so many matrices at a time as the cache holds."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import varying

# A block of matrices has at least this many, and entries up to:
_FEWEST, _ENTRIES = 8, 1 << 14


def in_blocks(fun: Callable[..., tuple], t: jax.Array, *args: jax.Array) -> tuple:
    """`fun` of T (*batch, m, p) and other arrays with the same leading dimensions, as its results have.

    What `fun` makes on the way, several arrays of T's size, then stays in the cache, and its branches
    are taken for a block, not for all. The last block begins earlier rather than being filled up, so
    some of its matrices are solved twice. Not differentiable: for use inside custom derivatives.
    """
    batch, (m, p) = t.shape[:-2], t.shape[-2:]
    alike = all(a.shape[: len(batch)] == batch for a in args)
    if not alike or not all(isinstance(d, int) for d in (*batch, m, p)):
        return fun(t, *args)
    count, size = math.prod(batch), max(_FEWEST, _ENTRIES // max(1, m * p))
    if count < 2 * size:
        return fun(t, *args)

    def block_by_block(*args):
        flat = [a.reshape(count, *a.shape[len(batch) :]) for a in args]
        shapes = jax.eval_shape(fun, *(jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in flat))

        def one(i, out):
            first = jnp.minimum(i * size, count - size)
            new = fun(*(lax.dynamic_slice_in_dim(a, first, size) for a in flat))
            pairs = zip(out, new, strict=True)
            return tuple(lax.dynamic_update_slice_in_dim(o, n, first, 0) for o, n in pairs)

        start: Any = tuple(jnp.zeros((count, *o.shape[1:]), o.dtype) for o in shapes)
        out = lax.fori_loop(0, -(-count // size), one, varying(start, args))
        return tuple(o.reshape(*batch, *o.shape[1:]) for o in out)

    return lax.platform_dependent(t, *args, cpu=block_by_block, default=fun)
