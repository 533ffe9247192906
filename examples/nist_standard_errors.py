"""Standard errors of the NIST linear-regression datasets against the certified ones.

They come from the factorisation that gave the solution, so that rank, covariance and residuals belong
together. rcond 1e-17 keeps everything. Wampler1 and Wampler2 are exact fits: certified error zero.
"""

import json
from pathlib import Path

import jax
import numpy as np

from jlstsq import factorize

jax.config.update("jax_enable_x64", True)

HERE = Path(__file__).parent / "nist"
FLOOR = {
    "longley": 11, "norris": 13, "pontius": 12, "noint1": 14, "noint2": 14, "wampler3": 13, "wampler4": 13,
    "wampler5": 13, "filip": 7,
}  # fmt: skip


def load(name: str, certified: dict) -> tuple[np.ndarray, np.ndarray]:
    """The design matrix and the observations."""
    rows = np.genfromtxt(HERE / f"{name}.csv", delimiter=",", skip_header=1)
    y, x = rows[:, 0], rows[:, 1:]
    if "no intercept" in certified["model"]:
        return x, y
    if x.shape[1] == 1:
        return np.vander(x[:, 0], len(certified["coefficients"]), increasing=True), y
    return np.column_stack([np.ones(len(y)), x]), y


digits = {}
print(f"{'dataset':10s}{'condition':>11s}{'digits':>8s}")
for name, certified in json.loads((HERE / "certified.json").read_text()).items():
    A, y = load(name, certified)
    expected = np.array([float(v) for v in certified["standard_errors"]])
    factors = factorize(A, 1e-17)
    errors = np.asarray(factors.standard_errors(y))
    if not expected.any():
        print(f"{name:10s}{float(factors.condition):11.1e}   exact fit: errors up to {errors.max():.0e}")
        continue
    digits[name] = -np.log10(max(np.max(np.abs(errors - expected) / expected), 1e-15))
    print(f"{name:10s}{float(factors.condition):11.1e}{digits[name]:8.1f}")
for name, floor in FLOOR.items():
    assert digits[name] >= floor, f"{name}: {digits[name]:.2f} digits, expected {floor}"
