"""What a rank-deficient design does under each driver, and what rcond decides.

Two of four sensors see the same signal up to noise of 1e-6. Kept, the small singular value multiplies
the noise of the measurement; cut by rcond, the minimum-norm solution shares the weight between the
two. The gradient follows the same decision.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jlstsq import lstsq

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
signals = rng.standard_normal((200, 3))
A = np.column_stack([signals, signals[:, 2] + 1e-6 * rng.standard_normal(200)])
truth = np.array([1.0, -2.0, 0.5, 0.5])
b = A @ truth + 1e-3 * rng.standard_normal(200)

print("singular values:", np.asarray(lstsq(A, b, driver="gelsd").singular_values))
print(f"{'driver':8s}{'rcond':>8s}{'rank':>6s}  solution")
for driver in ("gelsy", "gelsd", "gelss"):
    for rcond in (None, 1e-3):
        x, _, rank, _ = lstsq(A, b, rcond, driver=driver)
        name = "None" if rcond is None else str(rcond)
        print(f"{driver:8s}{name:>8s}{int(rank):6d}  {np.round(np.asarray(x), 2)}")

# A whole path of thresholds, one compiled program: rcond may be traced or differ per matrix.
thresholds = jnp.array([1e-12, 1e-3, 0.99, 1.0])
ranks = jax.vmap(lambda rcond: lstsq(A, b, rcond, driver="gelsd").rank)(thresholds)
print("ranks at", thresholds, "are", ranks)

# Exactly duplicated columns: gels answers NaN, not garbage.
duplicated = np.column_stack([signals, signals[:, 2]])
print("gels on duplicated columns:", lstsq(duplicated, b, driver="gels").solution)

cut = lstsq(A, b, 1e-3, driver="gelsd")
np.testing.assert_allclose(cut.solution, np.linalg.pinv(A, rcond=1e-3) @ b, atol=1e-10)
np.testing.assert_allclose(cut.solution, truth, atol=1e-2)
gradient = jax.grad(lambda b: lstsq(A, b, 1e-3, driver="gelsd").solution[0])(b)
np.testing.assert_allclose(gradient, np.linalg.pinv(A, rcond=1e-3)[0], atol=1e-10)
assert np.isnan(lstsq(duplicated, b, driver="gels").solution).all()
assert ranks.tolist()[1:] == [3, 1, 0]
