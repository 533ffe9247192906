"""A large batch on CPU: for so many matrices at a time as the cache holds."""

import math
from collections.abc import Callable
from itertools import chain

import jax

from . import _lanes as lanes
from ._batch_last import Unknown, batch_last
from ._kernel import LIBRARY, may_be_marked
from ._numerics import ENTRIES, block_by_block
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
    branches are taken for a block, not for all. Blocks of small matrices are computed in lanes, all in one
    kernel (`batch_last`). Not differentiable: for use inside custom derivatives.
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
    # Of fewer what there is to save is less than what it takes to compile.
    in_lanes = count >= 2 * lanes.LANES and largest <= ENTRIES and may_be_marked()
    if not largest or (not in_lanes and count < 2 * size):
        return fun(*args)

    def on_cpu(*args):
        flat = [a.reshape(count, *a.shape[len(batch) :]) for a in args]
        if in_lanes:
            try:
                out = lanes.over_blocks(batch_last(fun), *flat)
                return tuple(o.reshape(*batch, *o.shape[1:]) for o in out)
            except Unknown:  # a library's function, say
                pass
        if count < 2 * size:
            return fun(*args)
        out = block_by_block(jax.jit(fun), size, flat)
        return tuple(o.reshape(*batch, *o.shape[1:]) for o in out)

    return platform_dependent(*args, cpu=on_cpu, default=fun)
