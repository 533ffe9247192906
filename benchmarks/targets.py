"""What the library is held to: the least ratio peer time / ours, and limits on compile time and memory."""

from collections.abc import Callable
from dataclasses import dataclass

from .cases import Case

COMPILE_OVER_JNP = 3.0  # all outputs used: our compile time over jnp.linalg.lstsq's
GRADIENT_COMPILE_SECONDS = 3.0
TALL_TEMPORARY = 2.5  # gels on tall cases: temporary memory over bytes of A


@dataclass(frozen=True)
class Target:
    peer: str
    at_least: float
    drivers: tuple[str, ...] = ("gels", "gelsy", "gelsd")
    modes: tuple[str, ...] = ("all",)
    groups: tuple[str, ...] = ()  # empty: every group
    where: Callable[[Case], bool] = lambda case: True


def _hard(case: Case) -> bool:
    return case.spectrum in ("hard", "deficient")


_SQUARE = ("square and wide",)

# The first row that fits decides.
CPU = (
    Target("torch", 2.0, modes=("gradient",)),
    Target("torch", 0.7, drivers=("gelsy", "gelsd"), where=_hard),
    Target("torch", 1.0, groups=("tall",)),
    Target("torch", 2.0, groups=("very tall",)),
    Target("torch", 5.0, groups=("tiny batch",)),
    Target("torch", 1.5, groups=("small batch",)),
    Target("torch", 1.3, groups=("medium batch",)),
    Target("torch", 0.8, drivers=("gels", "gelsy"), groups=_SQUARE),
    Target(
        "torch", 2.0, drivers=("gelsd",), modes=("solution",), groups=_SQUARE, where=lambda c: not _hard(c)
    ),
    Target("torch", 0.6, drivers=("gelsd",), groups=_SQUARE),
    Target("torch", 1.0, drivers=("gels", "gelsy"), groups=("eager",)),
    Target("jnp", 0.8, drivers=("gelsd",), where=lambda c: c.entries >= 10000 and c.truncates),
    Target("jnp", 1.3, drivers=("gelsd",), where=lambda c: c.entries >= 10000 and min(c.m, c.n) >= 500),
    Target("jnp", 3.0, where=lambda c: c.entries >= 10000),
    Target("lineax", 1.0, drivers=("gels",)),
)
_AIMED_HIGHER = ("tall", "very tall", "tiny batch", "small batch", "medium batch")
GPU = (
    Target("torch", 3.0, groups=_AIMED_HIGHER),
    Target("torch", 1.0),
    Target("jnp", 3.0, groups=_AIMED_HIGHER),
    Target("jnp", 1.0),
)


def target(case: Case, peer: str, driver: str, mode: str, platform: str) -> float | None:
    """The least ratio asked for, or None where nothing is."""
    for row in CPU if platform == "cpu" else GPU:
        asked = row.peer == peer and driver in row.drivers and mode in row.modes
        if asked and (not row.groups or case.group in row.groups) and row.where(case):
            return row.at_least
    return None
