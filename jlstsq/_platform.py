"""Code for one platform: which it is, where that is known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

# Set while code for CPU alone is traced. What is traced under it is not used elsewhere: it is part of the key
# of JAX's caches.
_on_cpu = jax.make_user_context(default_value=False)


def on_cpu() -> bool:
    """Whether what is traced runs on CPU; False where that is not known."""
    return _on_cpu.value


def platform_dependent(*args: Any, cpu: Callable | None = None, default: Callable, **others: Callable) -> Any:
    """`lax.platform_dependent`, whose other branches are not traced in the branch for CPU of another one."""
    if on_cpu():
        return (cpu or default)(*args)
    if cpu is not None:
        others["cpu"] = partial(_known, cpu)
    return lax.platform_dependent(*args, default=default, **others)


def _known(cpu: Callable, *args: Any) -> Any:
    with _on_cpu(True):
        return cpu(*args)
