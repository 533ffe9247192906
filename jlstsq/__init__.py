"""Least squares in JAX: every driver on every platform, with exact derivatives of any order."""

from ._factorization import Factorization, factorize
from ._lstsq import lstsq
from ._result import LstsqResult

__version__ = "0.1.0"
__all__ = ["Factorization", "LstsqResult", "factorize", "lstsq"]
