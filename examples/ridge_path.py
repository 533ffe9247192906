"""Many ridges, one factorisation: the path of the solution as the ridge grows.

`vmap` over the ridge reduces A once: the ridge enters on the small triangle only. The compiled
program holds one QR factorisation of 2000 x 8 data for 500 ridges.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jlstsq import factorize

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
u, v = np.linalg.qr(rng.standard_normal((2000, 8)))[0], np.linalg.qr(rng.standard_normal((8, 8)))[0]
s = np.logspace(0, -6, 8)
A = (u * s) @ v.T
b = A @ np.ones(8) + 1e-3 * rng.standard_normal(2000)
ridges = jnp.logspace(-14, 1, 500)


@jax.jit
def path(A, b, ridges):
    factors = factorize(A)

    def at(ridge):
        ridged = factors.with_ridge(ridge)
        x, rho, *_ = ridged.lstsq(b)
        return x, rho[0], ridged.gcv(b)[0]

    return jax.vmap(at)(ridges)


x, rho, gcv = path(A, b, ridges)
print("   ridge      |x|   residual        GCV")
for i in range(0, 500, 83):
    row = [float(v) for v in (ridges[i], jnp.linalg.norm(x[i]), rho[i], gcv[i])]
    print("{:8.1e} {:8.4g} {:10.4g} {:10.4g}".format(*row))
print(f"smallest GCV at ridge {float(ridges[jnp.argmin(gcv)]):.1e}")

# one reduction of A for all of them
text = path.lower(A, b, ridges).compile().as_text()
reductions = [line for line in text.splitlines() if "geqrf" in line and " = (f64[2000," in line]
print("QR factorisations of A:", len(reductions))

# the definition: every singular value filtered by s / (s^2 + ridge)
factor = s / (s**2 + np.asarray(ridges)[:, None])
expected = (factor * (u.T @ b)) @ v.T
np.testing.assert_allclose(x, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())
assert (np.diff(np.asarray(rho)) > -1e-12).all()
if jax.default_backend() == "cpu":
    assert len(reductions) == 1
