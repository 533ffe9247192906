"""Small numerical tools that every other module uses: adjoint, exact products, exact scaling."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._kernel import LIBRARY
from ._platform import on_cpu, platform_dependent

# Columns of one matrix up to which single precision is worth a try in itself.
_SINGLE = 64
# Terms from which a sum in single precision has lost digits.
_MANY = 10_000


# Columns and entries up to which matrices are small.
_COLUMNS, ENTRIES = 8, 64


def small(*shapes: tuple) -> bool:
    """Whether matrices of these shapes are small; symbolic dimensions are large."""
    known = all(isinstance(d, int) for shape in shapes for d in shape)
    return known and all(shape[-1] <= _COLUMNS and shape[-1] * shape[-2] <= ENTRIES for shape in shapes)


def H(a: jax.Array) -> jax.Array:
    """The conjugate transpose of the last two axes."""
    return a.mT.conj()


def mm(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product at full precision: no TF32 on GPU, no bfloat16 passes on TPU."""
    if on_cpu() and a.ndim > 2 and b.ndim > 2 and small(a.shape, b.shape):
        terms = (LIBRARY - 1) // max(1, math.prod(a.shape[:-1]) * b.shape[-1])
        if a.shape[-1] > 0 and terms >= min(2, a.shape[-1]):
            return _in_loops(a, b, terms)
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _in_loops(a: jax.Array, b: jax.Array, terms: int) -> jax.Array:
    """The product of small matrices of a batch on CPU, as sums of so many terms.

    To call a library, or XLA's own code for products, takes two to four times as long.
    """
    inner = a.shape[-1]
    parts = (slice(i, i + terms) for i in range(0, inner, terms))
    return reduce(jnp.add, ((a[..., :, part, None] * b[..., None, part, :]).sum(-2) for part in parts))


def abs2(a: jax.Array) -> jax.Array:
    """|a|^2 as a real array; unlike abs(a)**2 it has a derivative at zero."""
    return a.real**2 + a.imag**2 if jnp.iscomplexobj(a) else a**2


def in_double(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether on CPU data of single precision has its Gram matrix and what goes with it in double precision.

    One matrix of few columns is worth a try in single precision, which takes half the time.
    """
    *batch, _, p = shape
    return jnp.finfo(dtype).bits == 32 and (len(batch) > 0 or p > _SINGLE)


def many_terms(t: jax.Array) -> bool:
    """Whether sums over the rows of T, in single precision, lose digits that a correction brings back."""
    m = t.shape[-2]
    return jnp.finfo(t.dtype).bits == 32 and (not isinstance(m, int) or m > _MANY)


@contextmanager
def double_precision(dtype: Any) -> Iterator[Any]:
    """Where double precision exists whatever the user's setting is; yields that of `dtype`.

    Only for functions that `native_batch` traces again under vmap, and that are never differentiated:
    JAX transforms a traced program with the setting of the place where it does so.
    """
    with jax.enable_x64(True):
        yield np.result_type(dtype, np.float64)


def real_dtype(dtype: Any) -> Any:
    """The dtype of the absolute value."""
    return jnp.finfo(dtype).dtype


def hashed(count: int) -> jax.Array:
    """Fixed pseudo-random bits: a hash of 0, 1, ... (MurmurHash3's last step), uint32."""
    h = jnp.arange(count, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)


def identity_like(a: jax.Array) -> jax.Array:
    """Identity matrices of the shape, dtype and batch of the square a."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def pick(flags: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`a` where the flag of the batch element is set, `b` elsewhere; arrays of any rank."""
    return jnp.where(flags.reshape(flags.shape + (1,) * (a.ndim - flags.ndim)), a, b)


def flat(q: jax.Array) -> jax.Array:
    """Q (*batch, m, p) column after column in one axis, which leaves XLA no order to choose.

    LAPACK writes Q by columns; where branches return it as a matrix, XLA on CPU copies it to and fro.
    """
    return q.mT.reshape(*q.shape[:-2], q.shape[-1] * q.shape[-2])


def transposed(q: jax.Array, r: jax.Array) -> jax.Array:
    """Q^T of a flat Q, that has as many columns as the triangle r."""
    return q.reshape(*q.shape[:-1], r.shape[-1], q.shape[-1] // r.shape[-1])


def indices(a: jax.Array) -> jax.Array:
    """0, 1, ... along the last axis of the integers a, and of their shape."""
    return lax.broadcasted_iota(a.dtype, a.shape, a.ndim - 1)


def inverse_permutation(perm: jax.Array) -> jax.Array:
    """The inverse of permutations (*batch, p) of few numbers: comparing all is faster than to sort."""
    index = indices(perm)
    return jnp.where(perm[..., None, :] == index[..., :, None], index[..., None, :], 0).sum(
        -1, dtype=perm.dtype
    )


def taken(a: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """The rows (axis -2) or columns (-1) of A (*batch, m, n) in the order (*batch, count).

    Of small matrices of a batch on CPU by comparing all.
    """
    if not (on_cpu() and a.ndim > 2 and small(a.shape)):
        return jnp.take_along_axis(a, order[..., None, :] if axis == -1 else order[..., None], axis=axis)
    if math.prod(order.shape) * math.prod(a.shape[-2:]) >= LIBRARY:  # one sum has too many terms, see `mm`
        place, out = jnp.expand_dims(order, -2 if axis == -1 else -1), jnp.zeros((), a.dtype)
        for i in range(a.shape[axis]):
            out = jnp.where(place == i, lax.slice_in_dim(a, i, i + 1, axis=axis), out)
        return out
    index = lax.broadcasted_iota(order.dtype, (*(1,) * (a.ndim - 1), a.shape[axis], 1), a.ndim - 1)
    if axis == -1:
        return jnp.where(order[..., None, None, :] == index, a[..., None], 0).sum(-2)
    return jnp.where(order[..., None, None] == index, a[..., None, :, :], 0).sum(-2)


def where_matrix(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A where the batch element's condition holds, b elsewhere."""
    return jnp.where(condition[..., None, None], a, b)


def largest(a: jax.Array, axis: Any = -1) -> jax.Array:
    """The maximum of real numbers, 0 at least; NaN counts as Inf.

    XLA on CPU (jaxlib 0.10.2) loses NaN in a maximum over arrays of more than some thousand entries.
    """
    return jnp.where(jnp.isnan(a), jnp.inf, a).max(axis, initial=0)


def largest_entry(a: jax.Array, axis: int | tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The largest modulus (max norm of re, im), 0 where not all entries are finite, and whether they are.

    From plain maxima, minima and sums of squares: XLA on CPU reads the data for those, where it would
    write their moduli first. A maximum may lose NaN (see `largest`), a sum of squares does not.
    """
    a = lax.stop_gradient(a)
    parts = (a.real, a.imag) if jnp.iscomplexobj(a) else (a,)
    extremes = [e for part in parts for e in (part.max(axis, initial=0), -part.min(axis, initial=0))]
    maximum = jnp.stack(extremes).max(0)
    finite = jnp.isfinite(maximum) & ~jnp.isnan(abs2(a).sum(axis))
    return jnp.where(finite, maximum, 0), finite


def column_norms(a: jax.Array) -> jax.Array:
    """The norms of the columns of A (*batch, m, p), of any size: squares of tiny ones underflow."""
    up, down = power_of_two(largest_entry(a, -2)[0])
    return up * jnp.sqrt(abs2(a * down[..., None, :].astype(a.dtype)).sum(-2))


def scaled(t: jax.Array, down: jax.Array | None) -> jax.Array:
    """T times a power of two a matrix, T itself without one."""
    return t if down is None else t * down[..., None, None].astype(t.dtype)


def power_of_two(size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two next to size, and its exact inverse; 1 for size zero.

    Rounding to no mantissa bits is exact and, unlike a bit cast, exists for float64 on TPU. The
    exponent stays two away from the ends of the range, so that the inverse is a normal number.
    """
    info = jnp.finfo(size.dtype)
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    size = jnp.clip(size, info.tiny * 4, info.max / 4)
    # the exponent's width: tiny = 2^(2 - 2^(bits - 1))
    power = lax.reduce_precision(size, exponent_bits=info.nexp, mantissa_bits=0)
    return power, 1 / power


def scale_by(a: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A * up * down, powers of two, without overflow or underflow on the way to a normal result."""
    same = (up > 1) == (down > 1)
    ratio = up * down
    one = jnp.ones_like(ratio)
    first, second = jnp.where(same, up, ratio), jnp.where(same, down, one)
    return a * first.astype(a.dtype) * second.astype(a.dtype)


def _varying_axes(a: Any) -> frozenset:
    """The mesh axes over which `a` varies, under the two names that JAX has had for them."""
    kind = jax.typeof(a)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying


def varying(tree: Any, *data: Any) -> Any:
    """`tree` as varying over the mesh axes over which `data` does, and `tree` itself.

    Inside `shard_map` the constants that a loop starts with, and those that one branch of a cond
    returns, must have the type of what data makes of them.
    """
    axes = {axis for a in jax.tree.leaves((tree, data)) for axis in _varying_axes(a)}

    def cast(a):
        missing = tuple(axes - _varying_axes(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree) if axes else tree


def block_by_block(fun: Callable[..., tuple], size: int, args: Sequence[jax.Array]) -> tuple:
    """`fun` of so many at a time of the leading axis of its arguments, which has at least as many.

    The last block begins earlier rather than being filled up, so some are computed twice. Not differentiable.
    """
    count = args[0].shape[0]
    results = jax.eval_shape(fun, *(jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in args))

    def one(i, out):
        first = jnp.minimum(i * size, count - size)
        new = fun(*(lax.dynamic_slice_in_dim(a, first, size) for a in args))
        pairs = zip(out, new, strict=True)
        return tuple(lax.dynamic_update_slice_in_dim(o, n, first, 0) for o, n in pairs)

    # All of it is overwritten. Zeros would be one array for all loops, and each would copy it.
    any_number = next(a.real.reshape(-1)[0] for a in reversed(args) if a.size)
    start: Any = tuple(jnp.full((count, *o.shape[1:]), any_number.astype(o.dtype)) for o in results)
    return lax.fori_loop(0, -(-count // size), one, varying(start, args))


def cond(predicate: jax.Array, true: Callable, false: Callable, *data: Any) -> Any:
    """`lax.cond` of functions without arguments, whose results may be constants inside `shard_map`."""
    return lax.cond(predicate, lambda: varying(true(), data), lambda: varying(false(), data))


def cond_on_cpu(predicate: jax.Array, work: Callable, nothing: Callable, *data: Any) -> Any:
    """`work` where it is needed. Elsewhere than on CPU always: a branch costs as much as a pass over data."""
    return platform_dependent(
        cpu=lambda: cond(predicate, work, nothing, *data), default=lambda: varying(work(), data)
    )


def native_batch(
    fun: Callable,
    matrices: int,
    columns_out: tuple[bool, ...],
    thresholds: int = 0,
) -> Callable:
    """Let a user's vmap land on the batch dimensions that `fun` already has.

    `fun(*args)` takes arrays with common leading batch dimensions and returns a tuple. Its first
    `matrices` arguments belong to the matrix A, the others are right-hand sides whose last axis
    counts columns, as the last axis of the outputs marked in `columns_out` does. Where vmap batches
    only right-hand sides, they become more columns against the one matrix. `lax.cond` inside `fun`
    then sees one scalar predicate and stays a branch, where plain vmap would run both sides.

    Between the two may stand `thresholds` arguments, for which `fun` broadcasts: where vmap batches
    only these, the others get a leading dimension of 1. All outputs have a batch then, whether they
    depend on the thresholds or not: a value must have one exactly where its derivative's rule has
    (JAX 0.10.2 gives wrong derivatives otherwise).

    Only for use inside the primal of a custom_jvp: custom_vmap has no reverse mode.
    """
    batched = jax.custom_batching.custom_vmap(fun)

    @batched.def_vmap
    def rule(size, in_batched, *args):
        first_rhs = matrices + thresholds
        by_threshold = any(in_batched[matrices:first_rhs])
        if by_threshold and not any(in_batched[:matrices]) and not any(in_batched[first_rhs:]):
            args = [a if moved else a[None] for a, moved in zip(args, in_batched, strict=True)]
            out = batched(*args)
            same = ((o, (size, *o.shape[1:])) for o in out)
            return tuple(jnp.broadcast_to(o, shape) for o, shape in same), (True,) * len(out)
        if any(in_batched[:first_rhs]):
            args = [
                a if moved else jnp.broadcast_to(a, (size, *a.shape))
                for a, moved in zip(args, in_batched, strict=True)
            ]
            out = batched(*args)
            return out, (True,) * len(out)
        rhs = [
            jnp.moveaxis(b if moved else jnp.broadcast_to(b, (size, *b.shape)), 0, -2)
            for b, moved in zip(args[first_rhs:], in_batched[first_rhs:], strict=True)
        ]
        out = batched(*args[:first_rhs], *(b.reshape(*b.shape[:-2], -1) for b in rhs))
        unfold = [
            jnp.moveaxis(o.reshape(*o.shape[:-1], size, o.shape[-1] // size), -2, 0) if c else o
            for o, c in zip(out, columns_out, strict=True)
        ]
        return tuple(unfold), columns_out

    return batched


@jax.custom_batching.custom_vmap
def any_of(flags: jax.Array) -> jax.Array:
    """Whether any flag of the whole batch is set: one scalar also under a user's vmap."""
    return flags.any()


@any_of.def_vmap
def _(size, in_batched, flags):
    return any_of(flags), False
