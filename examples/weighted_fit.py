"""A weighted polynomial fit with an error band.

The noise of the points differs by a factor of ten, so each is weighted by its inverse variance. The
band is the standard error of the fitted curve, from the covariance of the coefficients. Draws
`weighted_fit.png` if matplotlib is installed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlstsq import factorize

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(1)
t = np.sort(rng.uniform(-1, 1, 60))
sigma = np.where(t > 0, 0.3, 0.03)
truth = np.array([0.5, -1.0, 0.0, 2.0])
b = np.vander(t, 4, increasing=True) @ truth + sigma * rng.standard_normal(60)

A = np.vander(t, 4, increasing=True)
factors = factorize(A, weights=1 / sigma**2)
x, errors = factors.solve(b), factors.standard_errors(b)
variance = factors.lstsq(b).residuals[0] / (60 - factors.rank)  # of a point of weight one: about 1
for name, *values in zip(["1", "t", "t^2", "t^3"], truth, x, errors, strict=True):
    print("{:4s} true {:6.3f}   fitted {:6.3f} +- {:.3f}".format(name, *(float(v) for v in values)))
print(f"variance of a point of weight one: {float(variance):.2f}")

grid = np.linspace(-1, 1, 200)
G = np.vander(grid, 4, increasing=True)
curve = G @ x
band = jnp.sqrt(variance * jnp.einsum("ij,jk,ik->i", G, factors.covariance(), G))

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    plt.switch_backend("agg")
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.errorbar(t, b, sigma, fmt=".", ms=4, lw=0.6, color="gray", label="data, one sigma")
    axis.plot(grid, G @ truth, "k--", lw=0.8, label="truth")
    axis.plot(grid, curve, label="weighted fit")
    axis.fill_between(grid, curve - 2 * band, curve + 2 * band, alpha=0.3, label="two standard errors")
    axis.set(xlabel="t", ylabel="b")
    axis.legend()
    figure.savefig(Path(__file__).parent / "weighted_fit.png", dpi=80)

# the definition, by rows divided by sigma
reference, rest, *_ = np.linalg.lstsq(A / sigma[:, None], b / sigma)
inverse = np.linalg.inv((A / sigma[:, None]).T @ (A / sigma[:, None]))
np.testing.assert_allclose(x, reference, rtol=1e-10)
np.testing.assert_allclose(errors, np.sqrt(np.diag(inverse) * rest[0] / 56), rtol=1e-10)
assert (np.abs(np.asarray(x) - truth) < 4 * np.asarray(errors)).all()
