"""A function of a batch of small matrices, evaluated with the batch in the last axis of every array.

Written for leading batch dimensions, a step over small matrices is a loop over a few numbers inside one over
the batch, and no two neighbours in memory take part in the same operation. With the batch last all of them
do, and XLA on CPU compiles that to vector instructions.

`batch_last` interprets the traced function (`jax.extend.core`). It knows for each array which axis is the
batch, keeps the array with that axis moved to the end, and knows for each primitive what that makes of its
axes. Nothing is assumed of the function: what a step does with the batch is what it does here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ._kernel import materialized, one_kernel


class _Value(NamedTuple):
    """An array whose axis `axis` is the last one of `array`; None: no axis has been moved."""

    array: Any
    axis: int | None


class Unknown(NotImplementedError):
    """A primitive without a rule."""


# The parameter that holds the function, of calls that are evaluated as a part of what calls them.
_INLINED = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}
# (values, equation) -> values, where an axis of some value has been moved
_RULES: dict[str, Callable[[list[_Value], Any], list[_Value]]] = {}
# The same for those that are asked always.
_CALLS: dict[str, Callable[[list[_Value], Any], list[_Value]]] = {}
_WITHOUT_ARRAYS = ("iota", "platform_index")


def _rule(names: str, rules: dict = _RULES) -> Callable:
    def decorate(fun):
        rules.update(dict.fromkeys(names.split(), fun))
        return fun

    return decorate


def _moved(value: _Value, axis: int | None) -> Any:
    """The array with that axis last."""
    array, at = value
    if at == axis:
        return array
    if at is not None:
        array = jnp.moveaxis(array, -1, at)
    return array if axis is None else jnp.moveaxis(array, axis, -1)


def _values(arrays: Iterable, axes: Iterable[int | None]) -> list[_Value]:
    return [_Value(*v) for v in zip(arrays, axes, strict=True)]


def _arrays(values: Iterable[_Value], axes: Iterable[int | None]) -> list:
    return [_moved(v, axis) for v, axis in zip(values, axes, strict=True)]


def _axis_of(values: Sequence[_Value]) -> int:
    return next(v.axis for v in values if v.axis is not None)


def _place(d: int, axis: int, ndim: int) -> int:
    """Where the axis d of an array of so many is, if `axis` is the last."""
    return ndim - 1 if d == axis else d - (d > axis)


def _ordered(entries: Sequence, axis: int) -> tuple:
    """What belongs to the axes of an array, `axis` last."""
    return (*entries[:axis], *entries[axis + 1 :], entries[axis])


def _bound(equation: Any, *arrays: Any, **changed: Any) -> Any:
    return equation.primitive.bind(*arrays, **(equation.params | changed))


def _as_written(values: Iterable[_Value], equation: Any) -> list[_Value]:
    """The results of the primitive as it is, of arrays with no axis moved."""
    out = _bound(equation, *(_moved(v, None) for v in values))
    return [_Value(a, None) for a in (out if equation.primitive.multiple_results else [out])]


@_rule(
    "abs add add_any and clamp complex conj convert_element_type copy div eq exp ge gt imag integer_pow "
    "is_finite le log lt max min mul ne neg not or pcast pow pvary real reduce_precision rsqrt select_n sign "
    "sqrt square stop_gradient sub xla_metadata_value xor"
)
def _elementwise(values, equation):
    axis = _axis_of(values)
    # A predicate or bound may be a scalar.
    arrays = [_moved(v, axis) if jnp.ndim(v.array) else v.array for v in values]
    return [_Value(_bound(equation, *arrays), axis)]


@_rule("reduce_sum reduce_prod reduce_max reduce_min reduce_or reduce_and")
def _reduction(values, equation):
    ((array, axis),) = values
    axes = equation.params["axes"]
    places = tuple(sorted(_place(d, axis, array.ndim) for d in axes))
    left = None if axis in axes else axis - sum(d < axis for d in axes)
    return [_Value(_bound(equation, array, axes=places), left)]


@_rule("broadcast_in_dim")
def _(values, equation):
    ((array, axis),) = values
    shape, dims = equation.params["shape"], equation.params["broadcast_dimensions"]
    to = dims[axis]
    places = tuple(_place(d, to, len(shape)) for d in _ordered(dims, axis))
    return [_Value(lax.broadcast_in_dim(array, _ordered(shape, to), places), to)]


@_rule("transpose")
def _(values, equation):
    ((array, axis),) = values
    permutation = equation.params["permutation"]
    to = permutation.index(axis)
    order = tuple(_place(d, axis, array.ndim) for d in _ordered(permutation, to))
    return [_Value(array if order == tuple(range(array.ndim)) else lax.transpose(array, order), to)]


@_rule("reshape")
def _(values, equation):
    ((array, axis),) = values
    new = equation.params["new_sizes"]
    before = math.prod(array.shape[:axis])
    ends = (i for i, d in enumerate(new) if d == array.shape[-1] and math.prod(new[:i]) == before)
    to = next(ends, None)
    if to is None:
        return _as_written(values, equation)
    return [_Value(array.reshape(_ordered(new, to)), to)]


@_rule("squeeze")
def _(values, equation):
    ((array, axis),) = values
    dims = equation.params["dimensions"]
    if axis in dims:
        return _as_written(values, equation)
    places = tuple(_place(d, axis, array.ndim) for d in dims)
    return [_Value(lax.squeeze(array, places), axis - sum(d < axis for d in dims))]


@_rule("slice")
def _(values, equation):
    ((array, axis),) = values
    params = equation.params
    start, limit = (_ordered(params[name], axis) for name in ("start_indices", "limit_indices"))
    strides = params["strides"] and _ordered(params["strides"], axis)
    return [_Value(lax.slice(array, start, limit, strides), axis)]


@_rule("pad")
def _(values, equation):
    (array, axis), fill = values
    return [_Value(lax.pad(array, fill.array, _ordered(equation.params["padding_config"], axis)), axis)]


@_rule("rev")
def _(values, equation):
    ((array, axis),) = values
    places = tuple(_place(d, axis, array.ndim) for d in equation.params["dimensions"])
    return [_Value(lax.rev(array, places), axis)]


@_rule("concatenate")
def _(values, equation):
    axis = _axis_of(values)
    arrays = [_moved(v, axis) for v in values]
    return [_Value(lax.concatenate(arrays, _place(equation.params["dimension"], axis, arrays[0].ndim)), axis)]


@_rule("stack")
def _(values, equation):
    axis, d = _axis_of(values), equation.params["axis"]
    to = axis + (d <= axis)
    arrays = [_moved(v, axis) for v in values]
    return [_Value(jnp.stack(arrays, _place(d, to, arrays[0].ndim + 1)), to)]


@_rule("unstack")
def _(values, equation):
    ((array, axis),) = values
    d = equation.params["axis"]
    if d == axis:
        return _as_written(values, equation)
    parts = jnp.unstack(array, axis=_place(d, axis, array.ndim))
    return [_Value(a, axis - (d < axis)) for a in parts]


@_rule("split")
def _(values, equation):
    ((array, axis),) = values
    place = _place(equation.params["axis"], axis, array.ndim)
    return [_Value(a, axis) for a in lax.split(array, equation.params["sizes"], place)]


@_rule("dynamic_slice")
def _(values, equation):
    (array, axis), *starts = values
    starts = _ordered([s.array for s in starts], axis)
    return [_Value(lax.dynamic_slice(array, starts, _ordered(equation.params["slice_sizes"], axis)), axis)]


@_rule("dynamic_update_slice")
def _(values, equation):
    operand, update, *starts = values
    axis = _axis_of((operand, update))
    starts = _ordered([s.array for s in starts], axis)
    return [_Value(lax.dynamic_update_slice(_moved(operand, axis), _moved(update, axis), starts), axis)]


@_rule("gather")
def _(values, equation):
    """One of indices that are the same for the whole batch."""
    (array, axis), indices = values
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    collapsed, window = numbers.collapsed_slice_dims, numbers.offset_dims
    if indices.axis is not None or numbers.operand_batching_dims or axis is None or axis in collapsed:
        raise Unknown("gather")
    if sizes[axis] != array.shape[-1]:
        raise Unknown("gather")
    to = window[[d for d in range(array.ndim) if d not in collapsed].index(axis)]
    ndim = equation.outvars[0].aval.ndim
    moved = lax.GatherDimensionNumbers(
        tuple(sorted(_place(d, to, ndim) for d in window)),
        tuple(sorted(_place(d, axis, array.ndim) for d in collapsed)),
        tuple(_place(d, axis, array.ndim) for d in numbers.start_index_map),
    )
    changed = {"dimension_numbers": moved, "slice_sizes": _ordered(sizes, axis)}
    return [_Value(_bound(equation, array, indices.array, **changed), to)]


@_rule("optimization_barrier")
def _(values, equation):
    return _values(materialized(lambda *arrays: arrays, *(v.array for v in values)), [v.axis for v in values])


def _traced(fun: Callable, arrays: Sequence) -> tuple[Callable, list[int | None]]:
    """`fun` of arrays to values as one of arrays to arrays, traced once, and the axes of the values."""
    axes = []

    @jax.jit
    def call(*arrays):
        out = fun(*arrays)
        axes[:] = [v.axis for v in out]
        return [v.array for v in out]

    jax.eval_shape(call, *arrays)
    return call, axes


def _first(a: Iterable, b: Iterable) -> list[int | None]:
    return [y if x is None else x for x, y in zip(a, b, strict=True)]


def _loop(body: Callable, carry: list[_Value]) -> tuple[Callable, list, list[int | None]]:
    """The body of a loop on arrays, what it begins with, and the axes: it begins as it goes on."""

    def tried(axes):
        start = _arrays(carry, axes)
        step, out = _traced(lambda *arrays: body(_values(arrays, axes)), start)
        new = _first(axes, out)
        if new != axes:
            return tried(new)
        return lambda arrays: _arrays(_values(step(*arrays), out), axes), start, axes

    return tried([v.axis for v in carry])


@_rule("while", _CALLS)
def _(values, equation):
    params = equation.params
    for_cond, for_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body, carry = values[:for_cond], values[for_cond:for_body], values[for_body:]
    step, start, axes = _loop(lambda state: _evaluate(params["body_jaxpr"], [*of_body, *state]), carry)

    def going(arrays):
        return _moved(_evaluate(params["cond_jaxpr"], [*of_cond, *_values(arrays, axes)])[0], None)

    return _values(lax.while_loop(going, step, start), axes)


@_rule("scan", _CALLS)
def _(values, equation):
    """A loop with a counter, as `lax.fori_loop` makes: nothing is scanned."""
    params = equation.params
    body = params["jaxpr"].jaxpr
    # What is scanned has one axis more outside.
    pairs = zip((*body.invars, *body.outvars), (*equation.invars, *equation.outvars), strict=True)
    if any(inside.aval.shape != outside.aval.shape for inside, outside in pairs):
        raise Unknown("scan")
    constants = len(values) - len(equation.outvars)
    consts, carry = values[:constants], values[constants:]
    step, start, axes = _loop(lambda state: _evaluate(params["jaxpr"], [*consts, *state]), carry)
    kept = {name: params[name] for name in ("length", "reverse", "unroll")}
    arrays, _ = lax.scan(lambda arrays, _: (step(arrays), None), start, None, **kept)
    return _values(arrays, axes)


@_rule("cond", _CALLS)
def _(values, equation):
    index, *operands = values
    if index.axis is not None:
        raise Unknown("cond")
    arrays, given = [v.array for v in operands], [v.axis for v in operands]
    branches = [
        _traced(lambda *arrays, branch=branch: _evaluate(branch, _values(arrays, given)), arrays)
        for branch in equation.params["branches"]
    ]
    axes: list[int | None] = [None] * len(equation.outvars)
    for _, own in branches:
        axes = _first(axes, own)

    def alike(branch, own):
        return lambda *arrays: _arrays(_values(branch(*arrays), own), axes)

    return _values(lax.switch(index.array, [alike(*branch) for branch in branches], *arrays), axes)


@_rule("custom_linear_solve", _CALLS)
def _(values, equation):
    lengths, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
    start = lengths.matvec + lengths.vecmat
    consts = values[start : start + lengths.solve]
    return _evaluate(jaxprs.solve, [*consts, *values[sum(lengths) :]])


@_rule("custom_vmap_call", _CALLS)
def _(values, equation):
    """A library's function, or what stands for one: its results are written down, not fused with others."""
    axes = []

    def call(*arrays):
        out = _evaluate(equation.params["call"], _values(arrays, [v.axis for v in values]))
        axes[:] = [v.axis for v in out]
        return [v.array for v in out]

    return _values(one_kernel(call)(*(v.array for v in values)), axes)


def _evaluate(closed: Any, values: Iterable[_Value]) -> list[_Value]:
    """The results of a traced function."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict = dict(zip(jaxpr.invars, values, strict=True))
    known |= {v: _Value(c, None) for v, c in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True)}

    def value(atom):
        return _Value(atom.val, None) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        arguments = [value(atom) for atom in equation.invars]
        if name in _INLINED:
            out = _evaluate(equation.params[_INLINED[name]], arguments)
        elif name in _CALLS:
            out = _CALLS[name](arguments, equation)
        elif name not in _RULES and name not in _WITHOUT_ARRAYS:
            raise Unknown(name)
        elif all(v.axis is None for v in arguments):
            out = _as_written(arguments, equation)
        else:
            out = _RULES[name](arguments, equation)
        known |= dict(zip(equation.outvars, out, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def batch_last(fun: Callable[..., tuple]) -> Callable[..., tuple]:
    """`fun`, whose arguments and results have one leading batch axis, with that axis last.

    Not differentiable. Raises `Unknown` if the function has a primitive without a rule, as are all that XLA
    gives to a library.
    """

    def call(*args):
        traced = jax.jit(fun).trace(*(jnp.moveaxis(a, -1, 0) for a in args))
        out = _evaluate(traced.jaxpr, [_Value(a, 0) for a in args])
        return tuple(_moved(v, 0) for v in out)

    return call
