"""Arrays on a mesh with explicit axes: what axis each dimension of a result is sharded over.

JAX asks there for the sharding of every sum over a sharded dimension. So the solve runs with automatic
axes, where XLA chooses them, and only the results are explicit: batch dimensions and the columns of B as
the arguments have them, and a whole solution on every device of an axis that A's rows or columns use.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._result import LstsqResult


def explicit_mesh(*arguments: Any) -> Any:
    """The mesh with explicit axes that one of the arguments lies on, or None."""
    meshes = (jax.typeof(a).sharding.mesh for a in arguments if isinstance(a, jax.Array))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _axes(a: jax.Array) -> list:
    """The mesh axes of each dimension."""
    spec = tuple(jax.typeof(a).sharding.spec)
    return [*spec, *[None] * (a.ndim - len(spec))]


def _joined(a: list, b: list, batch: tuple, shapes: list[tuple]) -> list:
    """The axes of the broadcast batch dimensions: A's, or B's where A has none or does not vary."""
    out: list = [None] * len(batch)
    for axes, shape in zip((b, a), reversed(shapes), strict=True):
        first = len(batch) - len(shape)
        for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if axis is not None and size == batch[first + i]:
                out[first + i] = axis
    return out


def _named(mesh: Any, axes: list) -> NamedSharding:
    """A mesh axis shards one dimension: the first that asks for it."""
    used: set = set()
    spec = []
    for entry in axes:
        names = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        spec.append(None if names & used else entry)
        used |= names
    return NamedSharding(mesh, PartitionSpec(*spec))


def automatic(
    fun: Callable[..., LstsqResult],
    mesh: Any,
    shapes: LstsqResult,
    vector: bool,
    a: jax.Array,
    b: jax.Array,
    weights: jax.Array | None,
    *args: Any,
) -> LstsqResult:
    """`fun` of A, B, the weights and more, with results of these shapes."""
    core = 1 if vector else 2
    of_a, of_b = _axes(a)[:-2], _axes(b)
    of_w, batch_w = ([], ()) if weights is None else (_axes(weights)[:-1], weights.shape[:-1])
    matrices = jnp.broadcast_shapes(a.shape[:-2], batch_w)
    batch_a = _joined(of_a, of_w, matrices, [a.shape[:-2], batch_w])
    batch = _joined(batch_a, of_b[:-core], shapes.solution.shape[:-core], [matrices, b.shape[:-core]])
    columns = of_b[-1:]
    solution = [*batch, None] if vector else [*batch, None, *columns]
    residuals = [*batch, None] if vector else [*batch, *columns]
    axes = [solution, residuals, batch_a, [*batch_a, None]]
    # An output that a driver does not have is empty.
    out = [
        _named(mesh, entry if result.shape != (0,) else [])
        for entry, result in zip(axes, shapes, strict=True)
    ]
    solve: Any = jax.sharding.auto_axes(fun, axes=mesh.explicit_axes, out_sharding=LstsqResult._make(out))
    return solve(a, b, weights, *args)
