"""Fit the NIST linear-regression reference datasets with every driver; print the correct digits.

A digit count is the log relative error of the worst coefficient against NIST's certified values.
rcond 1e-17 keeps everything. At the default rcond Filip (condition number 1.8e15) has rank 10 of 11,
as in LAPACK, and the truncated solution shares no digit with the certified one.
"""

import csv
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from jlstsq import lstsq

jax.config.update("jax_enable_x64", True)
plt.switch_backend("agg")

HERE = Path(__file__).parent
DRIVERS = ("gels", "gelsy", "gelsd", "gelss")
# Correct digits that gels and gelsy must reach, from a backward stable QR in float64.
FLOOR = {
    "longley": 10.5, "norris": 12, "pontius": 11.5, "noint1": 14.5, "noint2": 14.5, "wampler1": 9,
    "wampler2": 12, "wampler3": 9, "wampler4": 7.5, "wampler5": 5.5, "filip": 7.5,
}  # fmt: skip


def load(name: str, certified: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The design matrix, the observations and the certified coefficients."""
    with open(HERE / "nist" / f"{name}.csv") as file:
        rows = np.array([[float(v) for v in row] for row in list(csv.reader(file))[1:]])
    y, x = rows[:, 0], rows[:, 1:]
    beta = np.array([float(c) for c in certified["coefficients"]])
    if "no intercept" in certified["model"]:
        return x, y, beta
    if x.shape[1] == 1:
        return np.vander(x[:, 0], len(beta), increasing=True), y, beta
    return np.column_stack([np.ones(len(y)), x]), y, beta


def digits(solution: np.ndarray, beta: np.ndarray) -> float:
    """The log relative error of the worst coefficient, at most 15."""
    error = np.max(np.abs(solution - beta) / np.abs(beta))
    return float(np.clip(-np.log10(max(error, 1e-15)), 0, 15))


datasets = json.loads((HERE / "nist" / "certified.json").read_text())
table = {}
figure, axes = plt.subplots(3, 4, figsize=(14, 9), layout="constrained")
print(f"{'dataset':10s}" + "".join(f"{d:>8s}" for d in DRIVERS))
for axis, (name, certified) in zip(axes.flat, datasets.items(), strict=False):
    A, y, beta = load(name, certified)
    fits = {d: np.asarray(lstsq(A, y, 1e-17, driver=d).solution) for d in DRIVERS}
    table[name] = [digits(fits[d], beta) for d in DRIVERS]
    print(f"{name:10s}" + "".join(f"{v:8.1f}" for v in table[name]))
    fitted = A @ fits["gelsy"]
    axis.plot(y, fitted, ".", ms=4)
    axis.axline((float(y.min()), float(y.min())), slope=1, lw=0.6, color="gray")
    axis.set(title=name, xlabel="observed", ylabel="fitted")

axis = axes.flat[-1]
picture = axis.imshow(np.array(list(table.values())), vmin=0, vmax=15, aspect="auto", cmap="viridis")
axis.set_xticks(range(4), DRIVERS)
axis.set_yticks(range(len(table)), list(table), fontsize=7)
axis.set_title("correct digits")
figure.colorbar(picture, ax=axis)
figure.savefig(HERE / "fit_nist.png", dpi=80)

A, y, _ = load("filip", datasets["filip"])
print("rank of Filip at the default rcond:", int(lstsq(A, y).rank), "of", A.shape[1])
for name, floor in FLOOR.items():
    gels, gelsy = table[name][:2]
    assert min(gels, gelsy) >= floor, f"{name}: {gels:.2f}, {gelsy:.2f} digits, expected {floor}"
