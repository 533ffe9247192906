"""One design matrix, thousands of measured curves: the factorisation is shared.

Spectra of 5 000 mixtures are fitted with 12 known Gaussian peaks. The right-hand sides may be columns
of B, a batch against an unbatched A, or a `vmap` over B: all factorise A once.
"""

import jax
import numpy as np

from jlstsq import lstsq

CHANNELS, PEAKS, MIXTURES = 300, 12, 5_000

rng = np.random.default_rng(0)
channel = np.linspace(0, 1, CHANNELS)
A = np.exp(-(((channel[:, None] - np.linspace(0.05, 0.95, PEAKS)) / 0.06) ** 2)).astype(np.float32)
concentrations = rng.uniform(0, 1, (PEAKS, MIXTURES)).astype(np.float32)
B = A @ concentrations + 1e-3 * rng.standard_normal((CHANNELS, MIXTURES)).astype(np.float32)

columns = lstsq(A, B)
batched = lstsq(A, B.T[..., None])
vmapped = jax.jit(jax.vmap(lambda b: lstsq(A, b).solution))(B.T)
print("solution", columns.solution.shape, "batched", batched.solution.shape, "vmap", vmapped.shape)
np.testing.assert_allclose(batched.solution[..., 0].T, columns.solution, atol=1e-4)
np.testing.assert_allclose(vmapped.T, columns.solution, atol=1e-4)

noise = np.sqrt(np.asarray(columns.residuals) / (CHANNELS - PEAKS))
print(f"noise from the residuals: {np.median(noise):.2e} (true 1e-03)")
error = np.abs(columns.solution - concentrations).max()
print(f"largest error of a concentration: {error:.4f}")

reference = np.linalg.lstsq(A.astype(np.float64), B.astype(np.float64))[0]
np.testing.assert_allclose(columns.solution, reference, atol=1e-4)
np.testing.assert_allclose(np.median(noise), 1e-3, rtol=0.05)
