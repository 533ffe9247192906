"""Variable projection: nonlinear features by gradient descent, the read-out by least squares inside the loss.

The model is y(t) = c_1 exp(-a_1 t) + c_2 exp(-a_2 t). The amplitudes c are linear, so the loss solves for
them, and its gradient in the decay rates a goes through `lstsq` (Golub and Pereyra 1973).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import least_squares

from jlstsq import lstsq

jax.config.update("jax_enable_x64", True)
plt.switch_backend("agg")

STEPS, RATE = 20_000, 0.05

rng = np.random.default_rng(0)
t = jnp.linspace(0, 4, 80)
y = 2 * jnp.exp(-0.5 * t) + jnp.exp(-3 * t) + 0.01 * rng.standard_normal(80)


def features(log_rates):
    return jnp.exp(-jnp.exp(log_rates) * t[:, None])


def loss(log_rates):
    return lstsq(features(log_rates), y).residuals[0]


@jax.jit
def train(log_rates):
    def step(log_rates, _):
        value, gradient = jax.value_and_grad(loss)(log_rates)
        return log_rates - RATE * gradient, value

    return jax.lax.scan(step, log_rates, length=STEPS)


log_rates, losses = train(jnp.log(jnp.array([0.2, 1.5])))
amplitudes = lstsq(features(log_rates), y).solution
print("rates", np.exp(log_rates), "amplitudes", amplitudes, "loss", float(losses[-1]))

plt.semilogy(losses)
plt.xlabel("step")
plt.ylabel("residual sum of squares")
plt.savefig(Path(__file__).with_suffix(".png"), dpi=80)

# Reference: all four parameters at once by SciPy's Levenberg-Marquardt.
reference = least_squares(
    lambda p: p[0] * np.exp(-p[1] * t) + p[2] * np.exp(-p[3] * t) - y, [1, 0.2, 1, 1.5], method="lm"
)
print("SciPy rates", reference.x[1::2], "amplitudes", reference.x[::2], "loss", 2 * reference.cost)
assert np.isfinite(losses).all()
np.testing.assert_allclose(losses[-1], 2 * reference.cost, rtol=1e-6)
np.testing.assert_allclose(np.exp(log_rates), reference.x[1::2], rtol=1e-2)
