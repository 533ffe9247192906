"""A function of small arrays as one kernel of XLA on CPU.

XLA on CPU calls one kernel after another, which is a large part of the time of many short steps over some
thousand numbers. The smallest of loops it compiles to one function instead, and so it does with a call that
bears its mark.

The mark is XLA's own and no promise to others: it is set only for the jaxlib it was tried with, on one
device, and only where nothing is in it that XLA gives to a library, which such a function cannot call. What
is exported keeps it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from ._platform import platform_dependent

_KNOWN = jaxlib.version.__version_info__[:3] in ((0, 10, 2), (0, 11, 2))
_MARK = {"xla_cpu_small_call": "true", "inlineable": "false"}
# Sums and maxima over so many real entries XLA on CPU (jax 0.10.2, 0.11.2) gives to a library, for which all
# terms are written first.
LIBRARY = 1 << 12
_SUMS = ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program, what is in its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                    yield from _equations(getattr(part, "jaxpr", part))


def largest_sum(traced: Any) -> int:
    """Of how many real numbers a traced function has sums and maxima, at most."""
    equations = _equations(traced.jaxpr.jaxpr)
    sums = (e.invars[0].aval for e in equations if e.primitive.name in _SUMS)
    return max((math.prod(a.shape) for a in sums if jnp.issubdtype(a.dtype, jnp.floating)), default=0)


def may_be_marked() -> bool:
    """Whether it may be set: where XLA might divide what it is on among devices, that does not compile."""
    try:
        one_device = jax.device_count("cpu") == 1
    except RuntimeError:  # no CPU here: for whom this is, is not known
        return False
    return _KNOWN and one_device and jax.sharding.get_abstract_mesh().empty


def one_kernel(fun: Callable, apart: bool = False) -> Callable:
    """`fun`, which is for CPU only and has no products of matrices or library calls, as one kernel.

    Inside another one it is a part of that. `apart`: also where it may not be one kernel XLA does not inline
    it. Under a user's vmap sums grow, and it is a function like any other. Not differentiable.
    """

    # XLA (jaxlib 0.10.2, 0.11.2) ends the process if such a function has an argument that it does not read,
    # and it reads none that is constant: XLA writes constants into what is called.
    def reading_all(*args):
        return fun(*args), sum(a.reshape(-1)[:1].real.astype(jnp.float32).sum() for a in args)

    traced = jax.jit(reading_all)

    @jax.custom_batching.custom_vmap
    def call(*args):
        if may_be_marked() and largest_sum(traced.trace(*args)) < LIBRARY:
            return set_xla_metadata(traced(*lax.optimization_barrier(args)), **_MARK)
        return set_xla_metadata(traced(*args), inlineable="false") if apart else traced(*args)

    @call.def_vmap
    def _(size, in_batched, *args):
        axes = tuple(0 if batched else None for batched in in_batched)
        of_batch = jax.vmap(reading_all, in_axes=axes, axis_size=size)
        out = one_kernel(of_batch, apart)(*args) if apart else of_batch(*args)
        return out, jax.tree.map(lambda _: True, out)

    return lambda *args: call(*args)[0]


def materialized(fun: Callable, *args: jax.Array) -> Any:
    """The results of `fun`, computed once: where they are decided on, or needed, in several places.

    XLA computes a number anew in every loop, or kernel on GPU, that needs it, each time with other roundings
    (fused multiply-adds). A sign, or a test for zero, of a number that cancels must not be answered in two
    ways. On CPU a barrier is gone when loops are fused, and a call is what remains. Not differentiable.
    """

    def behind_barrier(*args):
        return lax.optimization_barrier(fun(*args))

    return platform_dependent(*args, cpu=one_kernel(fun, apart=True), default=behind_barrier)
