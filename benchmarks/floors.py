"""How far the measured times are from what the machine allows: operations at its best rate, or bytes.

Counts are those of the path that a shape takes (docs/performance.md), for values of full rank and few
right-hand sides; the rates are those of one large product and of one pass over memory, as XLA does them.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from .cases import Case
from .report import load

_SINGLE = ("float32", "complex64")


def counts(case: Case) -> tuple[str, float, float]:
    """The path, its operations, and the data it has to read or write in bytes."""
    m, p, k = max(case.m, case.n), min(case.m, case.n), case.k
    single = case.dtype in _SINGLE
    if m * p <= 64 and p <= 8 and k <= 8:
        path, operations, passes = "lanes", 2 * m * p * (p + k), 2
    elif m >= (4 if single and p > 128 else 2) * p:
        # Gram matrix, Cholesky and inverse, one solution and one correction
        path, operations, passes = "Gram", 2 * m * p**2 + p**3 + 8 * m * p * k, 1 if case.batch else 5
    elif m == p >= 100 and not case.batch:
        path, operations, passes = "LU", 2 * p**3 / 3 + 6 * p**2 * (k + 32), 3
    else:
        path, operations, passes = "Householder", 2 * m * (p + k) ** 2 - 2 * (p + k) ** 3 / 3, 3
    operations *= max(case.batch, 1) * (4 if case.dtype.startswith("complex") else 1)
    return path, operations, passes * case.bytes_of_a


def _best(fun, *arrays) -> float:
    import jax

    jax.block_until_ready(fun(*arrays))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(fun(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rates() -> tuple[dict[str, float], float]:
    """Operations a second of a product of two matrices, by precision, and bytes a second of a sum."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    product = jax.jit(lambda a, b: a @ b)
    size = 2000
    operations = {}
    for dtype in ("float32", "float64"):
        a = jnp.ones((size, size), dtype)
        operations[dtype] = 2 * size**3 / _best(product, a, a)
    long = jnp.ones(1 << 25, "float64")
    return operations, long.nbytes / _best(jax.jit(jnp.sum), long)


def report(files: Sequence[Path]) -> None:
    """A row a case of the easy spectrum: the path, both times, the floor, and time over floor of gels."""
    operations, bandwidth = rates()
    rate = ", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in operations.items())
    print(f"products: {rate}; one pass over memory: {bandwidth / 1e9:.0f} GB/s\n")
    print("| case | path | operations, ms | bytes, ms | gels, ms | over the floor |")
    print("|---|---|---|---|---|---|")
    for results in load(files):
        for case, driver, mode, record in results.ours():
            if driver != "gels" or mode != "all" or case.spectrum != "easy" or "minimum" not in record:
                continue
            path, work, data = counts(case)
            single = case.dtype in _SINGLE
            by_work = 1e3 * work / operations["float32" if single else "float64"]
            by_data = 1e3 * data / bandwidth
            took = 1e3 * record["minimum"]
            print(
                f"| {case.name} | {path} | {by_work:.2f} | {by_data:.2f} | {took:.2f} "
                f"| {took / max(by_work, by_data):.1f} |"
            )
