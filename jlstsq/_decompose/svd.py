"""gelsd and gelss: the singular value decomposition of R, truncated.

R = U S V^H; singular values s_i <= rcond s_1 count as zero (Golub and Kahan 1965; LAPACK xGELSD).
Decomposing the triangle instead of A is Chan's (1982) QR-first SVD.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import H
from .kept import Kept


def _svd(r: jax.Array, driver: str, vectors: bool):
    """Gelss takes the QR-iteration SVD where it may: CUDA and ROCm."""

    def default(r):
        return lax.linalg.svd(r, full_matrices=False, compute_uv=vectors)

    def qr_iteration(r):
        algorithm = lax.linalg.SvdAlgorithm.QR
        return lax.linalg.svd(r, full_matrices=False, compute_uv=vectors, algorithm=algorithm)

    if driver == "gelsd":
        return default(r)
    return lax.platform_dependent(r, cuda=qr_iteration, rocm=qr_iteration, default=default)


def values(r: jax.Array, driver: str) -> jax.Array:
    """The singular values of R alone."""
    s = _svd(r, driver, vectors=False)
    return s[0] if isinstance(s, (tuple, list)) else s


def factors(r: jax.Array, driver: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, s, V of R = U diag(s) V^H."""
    u, s, vh = _svd(r, driver, vectors=True)
    return u, s, H(vh)


def decompose(r: jax.Array, rcond: jax.Array, driver: str) -> Kept:
    """The part of R above the cut. rcond NaN keeps nothing."""
    u, s, v = factors(r, driver)
    kept = s > rcond[..., None] * s[..., :1]
    w = jnp.where(kept[..., None, :], v, 0)
    diagonal = jnp.where(kept, s, 1)[..., None, :].astype(r.dtype) * jnp.eye(s.shape[-1], dtype=r.dtype)
    return Kept(e=w, r=diagonal, u=jnp.where(kept[..., None, :], u, 0), l=diagonal, w=w, kept=kept)
