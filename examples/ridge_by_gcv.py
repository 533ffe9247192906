"""Choose a ridge by gradient descent on the generalised cross-validation score.

A polynomial of degree 11 through 40 noisy points wants a ridge, and the data can say which: the GCV
score (Golub, Heath and Wahba 1979) estimates the error of predicting a point that was left out. The
derivative in the ridge is exact; descent goes along log10(ridge). A scan over a grid is the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jlstsq import factorize

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
t = np.linspace(-1, 1, 40)
A = np.vander(t, 12, increasing=True)
b = np.sin(3 * t) + 0.2 * rng.standard_normal(40)
factors = factorize(A)


def score(log_ridge):
    """The logarithm of the score, so that steps do not depend on the units of b."""
    return jnp.log(factors.with_ridge(10.0**log_ridge).gcv(b)[0])


@jax.jit
def descend(log_ridge):
    def step(log_ridge, _):
        value, slope = jax.value_and_grad(score)(log_ridge)
        return log_ridge - 2 * slope, value

    return jax.lax.scan(step, log_ridge, length=300)


log_ridge, values = descend(-1.0)
grid = jnp.linspace(-8, 2, 401)
scores = jax.vmap(score)(grid)  # the factorisation is shared
best = float(grid[jnp.argmin(scores)])
print(
    f"ridge by descent 10^{float(log_ridge):.3f}, by a grid 10^{best:.3f}; log score {float(values[-1]):.6f}"
)

truth = np.sin(3 * t)
chosen = np.asarray(A @ factors.with_ridge(10.0**log_ridge).solve(b))
none = np.asarray(A @ factors.solve(b))
print(
    f"error with the ridge {np.linalg.norm(chosen - truth):.3f}, without {np.linalg.norm(none - truth):.3f}"
)

# the definition, by leaving one out: its mean square is what the score approximates
loo = np.asarray(factors.with_ridge(10.0**log_ridge).loo_residuals(b))
print(f"leave-one-out {np.mean(loo**2):.5f}, GCV {np.exp(float(values[-1])):.5f}")
assert abs(float(log_ridge) - best) < 0.03
assert float(values[-1]) <= float(scores.min()) + 1e-6
