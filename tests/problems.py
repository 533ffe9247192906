"""Named least-squares problems from prescribed spectra, in NumPy float64 or complex128."""

import numpy as np


def orthonormal(rng, rows, columns, dtype):
    a = rng.standard_normal((rows, columns))
    if np.issubdtype(dtype, np.complexfloating):
        a = a + 1j * rng.standard_normal((rows, columns))
    return np.linalg.qr(a)[0]


def with_spectrum(rng, m, n, s, dtype=np.float64):
    """A random m x n matrix with singular values s."""
    p = len(s)
    u, v = orthonormal(rng, m, p, dtype), orthonormal(rng, n, p, dtype)
    return (u * np.asarray(s)) @ v.conj().T


def spectrum(kind, p):
    """Singular values of a named kind; 'deficient' drops the last ones, 'zero' all."""
    if kind == "well":
        return np.linspace(1, 0.3, p)
    if kind == "graded":
        return np.logspace(0, -3, p)
    if kind == "deficient":
        return np.where(np.arange(p) < max(1, p // 2), np.linspace(1, 0.3, p), 0)
    if kind == "equal":
        return np.ones(p)
    if kind == "zero":
        return np.zeros(p)
    raise ValueError(kind)


def right_hand_side(rng, m, k, dtype):
    b = rng.standard_normal((m, k))
    if np.issubdtype(dtype, np.complexfloating):
        b = b + 1j * rng.standard_normal((m, k))
    return b
