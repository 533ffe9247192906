"""Fit a straight line and a parabola to each of 20 000 short noisy series, in one compiled call.

The batch is a leading dimension; `jax.vmap` over the single fit gives the same call. The reference is
NumPy's pseudoinverse in float64.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jlstsq import lstsq

SERIES, SAMPLES = 20_000, 8

rng = np.random.default_rng(0)
t = np.sort(rng.uniform(-1, 1, (SERIES, SAMPLES)), axis=-1)
A = np.stack([np.ones_like(t), t, t**2], axis=-1).astype(np.float32)
truth = rng.standard_normal((SERIES, 3))
y = ((A @ truth[..., None])[..., 0] + 0.01 * rng.standard_normal((SERIES, SAMPLES))).astype(np.float32)

fit = jax.jit(lambda A, y: lstsq(A, y, driver="gels"))
result = jax.block_until_ready(fit(A, y))
start = time.perf_counter()
jax.block_until_ready(fit(A, y))
print(f"{SERIES} fits of {SAMPLES} samples: {1e3 * (time.perf_counter() - start):.1f} ms")

vmapped = jax.jit(jax.vmap(lambda A, y: lstsq(A, y, driver="gels").solution))(A, y)
np.testing.assert_allclose(vmapped, result.solution, rtol=1e-5, atol=1e-5)

sigma = jnp.sqrt(result.residuals[..., 0] / (SAMPLES - 3))
print(f"noise level, estimated from the residuals: {float(jnp.median(sigma)):.4f} (true 0.01)")

exact = A.astype(np.float64)
reference = (np.linalg.pinv(exact) @ y[..., None].astype(np.float64))[..., 0]
kappa = np.linalg.cond(exact)
error = np.linalg.norm(result.solution - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
print(f"median relative error {np.median(error):.1e}, worst error / kappa {np.max(error / kappa):.1e}")
assert np.max(error / kappa) < 100 * np.finfo(np.float32).eps
