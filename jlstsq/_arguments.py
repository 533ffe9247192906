"""Shapes, dtypes, promotion and broadcasting of the public functions; every message of theirs."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._decompose import DRIVERS
from ._numerics import real_dtype


def check_driver(driver: Any) -> str:
    """The driver's name in lower case; None is gelsy on every platform."""
    if driver is None:
        return "gelsy"
    name = driver.lower() if isinstance(driver, str) else driver
    if name not in DRIVERS:
        raise ValueError(f"driver must be one of {', '.join(DRIVERS)} or None, got {driver!r}.")
    return name


def check_array(a: Any, name: str) -> jax.Array:
    """A as a JAX array, of a dtype that can be computed in."""
    if not isinstance(a, (jax.Array, np.ndarray, np.generic)) and not hasattr(a, "__jax_array__"):
        raise TypeError(f"{name} must be a NumPy or JAX array, got {type(a).__name__}.")
    a = jnp.asarray(a)
    if not (jnp.issubdtype(a.dtype, jnp.number) or jnp.issubdtype(a.dtype, jnp.bool_)):
        raise TypeError(f"{name} must hold numbers, got dtype {a.dtype}.")
    return a


class Dtypes(NamedTuple):
    compute: Any  # float32, float64, complex64 or complex128
    result: Any  # compute, or the half precision that came in
    weak: bool


def common_dtypes(*arrays: jax.Array) -> Dtypes:
    """The dtype to compute in and the one to return: jnp's promotion, integers to float, half in float32."""
    dtype = jnp.result_type(*arrays)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.result_type(float)
    compute = jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
    return Dtypes(jnp.dtype(compute), jnp.dtype(dtype), all(_is_weak(a) for a in arrays))


def _is_weak(a: jax.Array) -> bool:
    return bool(getattr(jax.typeof(a), "weak_type", False))


def is_vector(a_shape: tuple, b: jax.Array) -> bool:
    """Whether B is one right-hand side per matrix; the vector reading wins ties."""
    return b.ndim == 1 or b.shape == a_shape[:-1]


def check_matrix(a: jax.Array) -> None:
    if a.ndim < 2:
        raise ValueError(f"A must have shape (*batch, m, n), at least 2 dimensions, got shape {a.shape}.")


def check_right_hand_side(a_shape: tuple, b: jax.Array, vector: bool, name: str = "B") -> tuple:
    """The broadcast batch shape; raises where B does not fit A, or C, of n rows, its adjoint."""
    m, what = (a_shape[-2], "m") if name == "B" else (a_shape[-1], "n")
    if b.ndim == 0:
        raise ValueError(f"{name} must have shape (*batch, {what}, k) or (*batch, {what}), got a scalar.")
    rows = b.shape[-1] if vector else b.shape[-2]
    if m != rows:
        same = (
            "A and B must have the same number of rows"
            if name == "B"
            else "C must have a row per column of A"
        )
        raise ValueError(f"{same}: {what} of A is {m}, of {name} is {rows} (shapes {a_shape} and {b.shape}).")
    batch_b = b.shape[:-1] if vector else b.shape[:-2]
    return _broadcast_batch(a_shape[:-2], batch_b, name)


def _broadcast_batch(batch_a: tuple, batch: tuple, name: str) -> tuple:
    """The common batch shape of A and of what is called `name`."""
    try:
        return jnp.broadcast_shapes(batch_a, batch)
    except ValueError as error:
        raise ValueError(
            f"the batch dimensions of A and {name} must broadcast: {batch_a} of A, {batch} of {name}."
        ) from error


def _per_matrix(value: Any, name: str, batch: tuple, of: str, dtype: Any) -> jax.Array:
    """A real number, or one for each matrix, as an array (*batch,) of a real dtype."""
    if isinstance(value, (str, bytes, list, tuple)) or jnp.iscomplexobj(value):
        raise TypeError(f"{name} must be a real number or array, got {type(value).__name__} {value!r}.")
    value = jnp.asarray(value).astype(dtype)
    try:
        fits = jnp.broadcast_shapes(value.shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to the batch dimensions of {of}: "
            f"{value.shape} of {name}, {batch} of {of}."
        )
    return jnp.broadcast_to(value, batch)


def resolve_rcond(rcond: Any, shape: tuple, dtype: Any) -> jax.Array:
    """The threshold of each matrix, shape (*batch_a,): eps * max(m, n) for None, eps where negative."""
    *batch, m, n = shape
    real = real_dtype(dtype)
    eps = float(jnp.finfo(real).eps)
    if rcond is None:
        # Beyond 1 / eps rows the product would call every matrix zero; xGELSD treats such values as eps.
        default = eps * max(m, n)
        if isinstance(default, float):
            return jnp.full(batch, default if default < 1 else eps, real)
        # an array, where the dimension is symbolic
        return jnp.full(batch, jnp.where(default < 1, default, eps), real)
    value = jax.lax.stop_gradient(_per_matrix(rcond, "rcond", tuple(batch), "A", real))
    return jnp.where(value < 0, eps, value)


def fold(b: jax.Array, batch_a: tuple, batch: tuple) -> tuple[jax.Array, list[int]]:
    """B (*batch_b, m, k) as (*batch_a, m, K): batch dimensions in which A does not vary become columns.

    Many right-hand sides against one matrix then share its factorisation. Returns the folded B and
    the dimensions of `batch` that were folded, for `unfold`.
    """
    lead = len(batch) - len(batch_a)
    padded_a = (1,) * lead + tuple(batch_a)
    b = jnp.reshape(b, (1,) * (len(batch) + 2 - b.ndim) + b.shape)
    folded = [i for i in range(len(batch)) if padded_a[i] == 1 and batch[i] != 1]
    kept_shape = [1 if i in folded else d for i, d in enumerate(batch)]
    target = [b.shape[i] if i in folded else d for i, d in enumerate(kept_shape)]
    b = jnp.broadcast_to(b, (*target, *b.shape[-2:]))
    # (…, folded dims as 1, m, folded dims, k)
    moved = jnp.moveaxis(b, folded, range(len(batch) + 1 - len(folded), len(batch) + 1))
    m = b.shape[-2]
    columns = math.prod(batch[i] for i in folded) * b.shape[-1]
    return jnp.reshape(moved, (*batch_a, m, columns)), folded


def unfold(x: jax.Array, batch_a: tuple, batch: tuple, folded: list[int], k: Any) -> jax.Array:
    """The inverse of `fold` on (*batch_a, K) or (*batch_a, rows, K)."""
    rows = x.shape[len(batch_a) : -1]
    rest = [d for i, d in enumerate(batch) if i not in folded]
    x = jnp.reshape(x, (*rest, *rows, *(batch[i] for i in folded), k))
    start = len(rest) + len(rows)
    return jnp.moveaxis(x, range(start, start + len(folded)), folded)


def check_weights(weights: Any, shape: tuple, dtype: Any) -> jax.Array | None:
    """The weights of the rows of A in the real dtype that is computed in; their batch is checked."""
    if weights is None:
        return None
    weights = check_array(weights, "weights")
    if jnp.iscomplexobj(weights):
        raise TypeError(f"weights must be real, got dtype {weights.dtype}.")
    if weights.ndim == 0 or weights.shape[-1] != shape[-2]:
        raise ValueError(
            f"weights must have shape (*batch, m), one for each row of A: m of A is {shape[-2]}, "
            f"the shape of weights is {weights.shape}."
        )
    _broadcast_batch(shape[:-2], weights.shape[:-1], "weights")
    return weights.astype(real_dtype(dtype))


def check_ridge(ridge: Any, batch: tuple, dtype: Any) -> jax.Array | None:
    """The ridge of each matrix, shape (*batch,), in the real dtype that is computed in."""
    if ridge is None:
        return None
    return _per_matrix(ridge, "ridge", batch, "A and weights", real_dtype(dtype))
