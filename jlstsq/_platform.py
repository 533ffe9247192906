"""Code for one platform: which it is, where that is known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

# Set while code for CPU alone is traced, or code for others: not traced then for what it is not for. What is
# traced under it is not used elsewhere: it is part of the key of JAX's caches.
_known = jax.make_user_context(default_value=None)


def on_cpu() -> bool:
    """Whether what is traced runs on CPU; False where that is not known."""
    return _known.value is True


def platform_dependent(*args: Any, cpu: Callable | None = None, default: Callable, **others: Callable) -> Any:
    """`lax.platform_dependent`, whose branches are not traced where it is known that they are not taken."""
    if on_cpu():
        return (cpu or default)(*args)
    others = {name: partial(_where, False, fun) for name, fun in others.items()}
    if cpu is not None and _known.value is None:
        others["cpu"] = partial(_where, True, cpu)
        default = partial(_where, False, default)
    return lax.platform_dependent(*args, default=default, **others) if others else default(*args)


def _where(cpu: bool, fun: Callable, *args: Any) -> Any:
    with _known(cpu):
        return fun(*args)
