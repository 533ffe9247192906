"""The table of cases: shapes, precisions, spectra, and the matrices that belong to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from math import ceil

import numpy as np

DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
MODES = ("all", "solution", "gradient")  # what is used of the call
SPECTRA = ("easy", "gaussian", "hard", "deficient")

_SHORT = {"float32": "f32", "float64": "f64", "complex64": "c64", "complex128": "c128"}


@dataclass(frozen=True)
class Case:
    """A X = B with `batch` matrices A (m, n), 0 for a single one without a batch axis, and k columns."""

    group: str
    batch: int
    m: int
    n: int
    k: int = 1
    dtype: str = "float64"
    spectrum: str = "easy"
    eager: bool = False  # the public function is called as it is, not from a jitted one

    @property
    def shape(self) -> str:
        return f"{self.batch}of{self.m}x{self.n}" if self.batch else f"{self.m}x{self.n}"

    @property
    def name(self) -> str:
        parts = [_SHORT[self.dtype], self.shape]
        parts += [f"k{self.k}"] if self.k > 1 else []
        parts += [self.spectrum] if self.spectrum != "easy" else []
        return "-".join([*parts, "eager"] if self.eager else parts)

    @property
    def entries(self) -> int:
        return max(self.batch, 1) * self.m * self.n

    @property
    def bytes_of_a(self) -> int:
        return self.entries * np.dtype(self.dtype).itemsize

    @property
    def work(self) -> float:
        """Operations of one QR factorisation of A, the leading term."""
        return 2.0 * self.entries * min(self.m, self.n)

    @property
    def kappa(self) -> float:
        """Condition number asked for; of the nonzero singular values where the rank is deficient."""
        single = np.dtype(self.dtype) in (np.dtype("float32"), np.dtype("complex64"))
        return (1e4 if single else 1e10) if self.spectrum == "hard" else 10.0

    @property
    def truncates(self) -> bool:
        """Whether the default rcond, eps * max(m, n), discards singular values."""
        rcond = float(np.finfo(self.dtype).eps) * max(self.m, self.n)
        return self.spectrum == "deficient" or self.kappa * rcond >= 1

    @property
    def modes(self) -> tuple[str, ...]:
        return ("all",) if self.eager else MODES

    def allows(self, driver: str) -> bool:
        """Gels and QR have no answer where the rank is deficient."""
        return self.spectrum != "deficient" or driver not in ("gels", "qr")


# Group: shapes (batch, m, n). The groups are those of the targets.
SHAPES = {
    "tall": [(0, 10000, 50), (0, 20000, 500)],
    "very tall": [(0, 100000, 20), (0, 100000, 100)],
    "tiny batch": [(100000, 4, 2), (10000, 8, 3)],
    "small batch": [(1000, 32, 8)],
    "medium batch": [(1000, 64, 32), (100, 200, 50)],
    "square and wide": [(0, 500, 500), (0, 1000, 1000), (0, 2000, 1000), (0, 50, 5000), (0, 500, 2000)],
}
EAGER = [(0, 10, 3), (0, 100, 20)]
MANY_COLUMNS = [(0, 10000, 50), (0, 100000, 20), (0, 500, 500), (0, 50, 5000), (10000, 8, 3), (1000, 32, 8)]
COMPLEX = [(0, 10000, 50), (0, 500, 500), (0, 50, 5000), (10000, 8, 3), (1000, 32, 8)]
# A random square matrix has kappa about m: in float32 on the edge of the default rcond.
GAUSSIAN = [(0, 500, 500), (0, 1000, 1000)]
REAL = ("float64", "float32")


def _table() -> Iterator[Case]:
    for dtype in REAL:
        for spectrum in SPECTRA:
            for group, shapes in SHAPES.items():
                for shape in shapes:
                    if spectrum != "gaussian" or shape in GAUSSIAN:
                        yield Case(group, *shape, dtype=dtype, spectrum=spectrum)
        for shape in EAGER:
            yield Case("eager", *shape, dtype=dtype, eager=True)
    for group, shapes in SHAPES.items():
        for shape in shapes:
            if shape in MANY_COLUMNS:
                yield from (Case(group, *shape, k=64, dtype=dtype) for dtype in REAL)
            if shape in COMPLEX:
                yield from (Case(group, *shape, dtype=dtype) for dtype in ("complex128", "complex64"))


CASES = tuple(_table())


def select(patterns: Sequence[str], quick: bool = False) -> list[Case]:
    """Cases whose name matches any pattern (a pattern without wildcards: contains it).

    Without patterns: all of them, or for `quick` the first of every group.
    """
    if patterns:
        wanted = [p if any(c in p for c in "*?[") else f"*{p}*" for p in patterns]
        return [case for case in CASES if any(fnmatch(case.name, p) for p in wanted)]
    if quick:
        first = {case.group: case for case in reversed(CASES)}
        return [case for case in CASES if first[case.group] is case]
    return list(CASES)


@lru_cache(maxsize=1)
def problem(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a case, the same in every process.

    The tall one of A and A^H is G V diag(s) V^H with s falling geometrically from 1 to 1/kappa. G is
    orthonormal, or Gaussian where A is so tall that this comes to nearly the same.
    """
    rng = np.random.default_rng(0)
    batch = (case.batch,) if case.batch else ()
    tall, p = max(case.m, case.n), min(case.m, case.n)

    def gaussian(*shape: int) -> np.ndarray:
        g = rng.standard_normal(shape)
        return g + 1j * rng.standard_normal(shape) if case.dtype.startswith("complex") else g

    g = gaussian(*batch, tall, p) / np.sqrt(tall)
    if case.spectrum == "gaussian":
        a = g
    else:
        if tall < 16 * p:
            g = np.linalg.qr(g)[0]
        s = np.geomspace(1, 1 / case.kappa, p)
        if case.spectrum == "deficient":
            s[ceil(p / 2) :] = 0
        v = np.linalg.qr(gaussian(p, p))[0]
        a = g @ ((v * s) @ v.conj().T)
    if case.m < case.n:
        a = np.swapaxes(a, -1, -2).conj()
    b = a @ gaussian(*batch, case.n, case.k) + 0.1 * gaussian(*batch, case.m, case.k)
    return np.ascontiguousarray(a, case.dtype), np.ascontiguousarray(b, case.dtype)
