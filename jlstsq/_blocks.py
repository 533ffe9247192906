"""A large batch on CPU: for so many matrices at a time as the cache holds."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _lanes as lanes
from ._kernel import LIBRARY
from ._numerics import ENTRIES, varying
from ._platform import platform_dependent

# A block of matrices has a multiple of this many, and entries up to (of the largest argument):
_FEWEST, _ENTRIES = 8, 1 << 14
# A block of small matrices has whole lanes, and if it can fewer entries than XLA gives to a library: sums
# over triangles then stay in loops.
_SMALL_ENTRIES = LIBRARY - 1


def of_matrices(fun: Callable[..., tuple], size: int | None = None) -> Callable[..., tuple]:
    """`fun`, whose first argument is T (*batch, m, p), in blocks of that batch."""
    return lambda t, *args: in_blocks(fun, t.shape[:-2], t, *args, size=size)


def in_blocks(fun: Callable[..., tuple], batch: tuple, *args: jax.Array, size: int | None = None) -> tuple:
    """`fun` of arrays with the leading dimensions `batch`, as its results have.

    What `fun` makes on the way, several arrays as large as the data, then stays in the cache, and its
    branches are taken for a block, not for all. The last block begins earlier rather than being filled up,
    so some matrices are solved twice. Not differentiable: for use inside custom derivatives.
    """
    shapes = [a.shape[len(batch) :] for a in args]
    alike = all(a.shape[: len(batch)] == batch for a in args)
    if not alike or not all(isinstance(d, int) for d in (*batch, *chain(*shapes))):
        return fun(*args)
    largest = max(math.prod(shape) for shape in shapes)
    count = math.prod(batch)
    if size is None:
        fewest, entries = (lanes.LANES, _SMALL_ENTRIES) if largest <= ENTRIES else (_FEWEST, _ENTRIES)
        size = max(1, entries // max(1, largest) // fewest) * fewest
    if count < 2 * size or not largest:
        return fun(*args)

    traced_once = jax.jit(fun)

    def block_by_block(*args):
        flat = [a.reshape(count, *a.shape[len(batch) :]) for a in args]
        results = jax.eval_shape(
            traced_once, *(jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in flat)
        )

        def one(i, out):
            first = jnp.minimum(i * size, count - size)
            new = traced_once(*(lax.dynamic_slice_in_dim(a, first, size) for a in flat))
            pairs = zip(out, new, strict=True)
            return tuple(lax.dynamic_update_slice_in_dim(o, n, first, 0) for o, n in pairs)

        # All of it is overwritten. Zeros would be one array for all loops, and each would copy it.
        any_number = next(a.real.reshape(-1)[0] for a in reversed(flat) if a.size)
        start: Any = tuple(jnp.full((count, *o.shape[1:]), any_number.astype(o.dtype)) for o in results)
        out = lax.fori_loop(0, -(-count // size), one, varying(start, args))
        return tuple(o.reshape(*batch, *o.shape[1:]) for o in out)

    return platform_dependent(*args, cpu=block_by_block, default=fun)
