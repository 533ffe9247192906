"""The ratios peer time / ours, marked against the targets, and two kinds of pictures of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import CASES, DRIVERS, MODES, Case
from .peers import PEERS
from .targets import COMPILE_OVER_JNP, GRADIENT_COMPILE_SECONDS, TALL_TEMPORARY, target

OURS = "jlstsq"
COLOURS = {"jlstsq": "#d62728", "torch": "#1f77b4", "jnp": "#2ca02c", "scipy": "#7f7f7f", "lineax": "#9467bd"}

Record = dict[str, Any]


@dataclass
class Results:
    """What was measured on one platform."""

    platform: str
    cases: dict[str, Case] = field(default_factory=dict)
    records: dict[tuple[str, str, str, str], Record] = field(default_factory=dict)  # case peer driver mode
    heads: list[str] = field(default_factory=list)

    def ours(self) -> Iterator[tuple[Case, str, str, Record]]:
        """Our records in the order of the table: case, driver, mode."""
        order = {case.name: i for i, case in enumerate(CASES)}
        for case in sorted(self.cases.values(), key=lambda case: order.get(case.name, len(order))):
            for driver in DRIVERS:
                for mode in MODES:
                    if record := self.records.get((case.name, OURS, driver, mode)):
                        yield case, driver, mode, record

    def rival(self, case: Case, peer: str, driver: str, mode: str) -> Record | None:
        """A peer without a solution-only call stands there with its only one."""
        theirs = PEERS[peer].rival(driver, self.platform) or ""
        found = self.records.get((case.name, peer, theirs, mode))
        if found is None and mode == "solution":
            found = self.records.get((case.name, peer, theirs, "all"))
        return found


def ratio(ours: Record, theirs: Record | None) -> float | None:
    if theirs and ours.get("minimum") and theirs.get("minimum"):
        return theirs["minimum"] / ours["minimum"]
    return None


def load(files: Sequence[Path]) -> list[Results]:
    """One `Results` a platform. Ratios stay within one file: of a case, the last file's records count."""
    loaded: dict[str, Results] = {}
    for file in files:
        data = json.loads(file.read_text())
        platform = data["meta"]["platform"]
        results = loaded.setdefault(platform, Results(platform))
        results.heads.append(_head(file, data))
        new = {name: Case(**case) for name, case in data["cases"].items()}
        results.cases |= new
        results.records = {key: record for key, record in results.records.items() if key[0] not in new}
        for record in data["records"]:
            key = (record["case"], record["peer"], record["driver"], record["mode"])
            results.records[key] = record
    return list(loaded.values())


def report(files: Sequence[Path], pictures: Path | None) -> None:
    for results in load(files):
        print("\n".join(results.heads))
        misses, held = _tables(results)
        print(f"\n{held - len(misses)} of {held} targets met." + (" Not met:" if misses else ""))
        print("".join(f"- {miss}\n" for miss in misses))
        _failures(results)
        if pictures:
            draw(results, pictures)


def _head(file: Path, data: dict[str, Any]) -> str:
    meta, options = data["meta"], data["meta"]["options"]
    versions: dict[str, str] = {}
    for peer in data["peers"].values():
        versions |= peer["versions"]
    device = next(iter(data["peers"].values()))["device"]
    return f"""# {file.name}
{meta["cores"]} cores ({meta["processor"]}), device {device}, {meta["date"]},
commit {meta["commit"] or "unknown"}; {", ".join(f"{k} {v}" for k, v in sorted(versions.items()))}.

{meta["cores"]} noisy, shared cores: times of different runs do not compare, ratios within one run do.
Ratio: peer time / ours, minimum over {options["rounds"]} interleaved rounds; above 1 {OURS} is faster.
`!` and a number: below that target. (nan): the peer's answer has NaN.
Modes: all = all outputs used; solution = only that one (a peer without such a call: its only call);
gradient = value and gradient of sum |x|^2 in A and B.
Compile: seconds, and over jnp's in the same mode. Memory: temporary, over bytes of A."""


def _tables(results: Results) -> tuple[list[str], int]:
    """Print a table per group; the targets that were not met, and how many there are."""
    measured = {key[1] for key in results.records}
    peers = [peer for peer in PEERS if peer != OURS and peer in measured]
    columns = ["case", "driver", "mode", "ms min", "median", *peers, "compile s", "/jnp", "memory/A", "jnp's"]
    misses: list[str] = []
    held = 0

    def mark(text: str, what: str, met: bool, wanted: str) -> str:
        nonlocal held
        held += 1
        if met:
            return text
        misses.append(f"{what}: {text}, target {wanted}")
        return f"{text} !{wanted}"

    tables: dict[str, list[list[str]]] = {}
    for case, driver, mode, ours in results.ours():
        what = f"{case.name} {driver} {mode}"
        cells = [case.name, driver, mode, *_times(ours)]
        for peer in peers:
            theirs = results.rival(case, peer, driver, mode)
            value = ratio(ours, theirs)
            text = _ratio_text(value, ours, theirs)
            wanted = target(case, peer, driver, mode, results.platform)
            if wanted is not None and theirs is not None and theirs.get("minimum"):
                met = value is not None and value >= wanted and ours["finite"]
                text = mark(text, f"{what}, {peer}", met, f"{wanted:.1f}")
            cells.append(text)
        tables.setdefault(case.group, []).append(
            cells + _costs(results, case, driver, mode, ours, what, mark)
        )
    for group, rows in tables.items():
        print(f"\n## {group}\n")
        _print_table(columns, rows)
    return misses, held


def _costs(results: Results, case: Case, driver: str, mode: str, ours: Record, what: str, mark) -> list[str]:
    """Compile time, the same over jnp's, temporary memory over bytes of A, and jnp's."""
    jnp = results.rival(case, "jnp", driver, mode) or {}
    seconds, theirs = ours["compile_seconds"], jnp.get("compile_seconds")
    compiled = over = memory = ""
    if seconds is not None:
        compiled = f"{seconds:.2f}"
        if mode == "gradient":
            limit = GRADIENT_COMPILE_SECONDS
            compiled = mark(compiled, f"{what}, compile s", seconds <= limit, f"{limit:.1f}")
        if theirs:
            over = f"{seconds / theirs:.1f}"
            if mode == "all":
                met = seconds <= COMPILE_OVER_JNP * theirs
                over = mark(over, f"{what}, compile / jnp", met, f"{COMPILE_OVER_JNP:.1f}")
    if ours["temporary_bytes"] is not None:
        share = ours["temporary_bytes"] / case.bytes_of_a
        memory = f"{share:.2f}"
        if driver == "gels" and case.group in ("tall", "very tall") and mode != "gradient":
            memory = mark(memory, f"{what}, memory / A", share <= TALL_TEMPORARY, f"{TALL_TEMPORARY:.1f}")
    theirs = jnp.get("temporary_bytes")
    return [compiled, over, memory, "" if theirs is None else f"{theirs / case.bytes_of_a:.2f}"]


def _times(record: Record) -> list[str]:
    if not record.get("minimum"):
        return [record["status"], ""]
    nan = "" if record["finite"] else " nan"
    return [f"{1e3 * record['minimum']:.3g}{nan}", f"{1e3 * record['median']:.3g}"]


def _ratio_text(value: float | None, ours: Record, theirs: Record | None) -> str:
    if theirs is None:
        return ""
    if value is None:
        return theirs["status"] if ours.get("minimum") else ours["status"]
    return f"{value:.2f}" if theirs["finite"] else f"{value:.2f} (nan)"


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in [columns, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def _failures(results: Results) -> None:
    for (case, peer, driver, mode), record in results.records.items():
        if record["message"]:
            print(f"- {case} {peer} {driver} {mode}: {record['status']}, {record['message']}")


def draw(results: Results, folder: Path) -> None:
    """A heat map of speed-up per case and peer for each mode, and time over size for each precision."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        _heat_map(results, mode, folder / f"speedup-{results.platform}-{mode}.png")
    for dtype in ("float64", "float32"):
        _time_over_size(results, dtype, folder / f"time-{results.platform}-{dtype}.png")


def _heat_map(results: Results, mode: str, file: Path) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    ratios: dict[tuple[str, str], float] = {}
    for case, driver, _, ours in (row for row in results.ours() if row[2] == mode):
        for peer in PEERS:
            value = ratio(ours, results.rival(case, peer, driver, mode)) if peer != OURS else None
            if value is not None:
                ratios[case.name, f"{peer} / {driver}"] = value
    if not ratios:
        return
    rows = list(dict.fromkeys(row for row, _ in ratios))
    columns = sorted({column for _, column in ratios}, key=lambda c: (list(PEERS).index(c.split()[0]), c))
    values = np.array([[ratios.get((row, column), np.nan) for column in columns] for row in rows])

    fig, ax = plt.subplots(figsize=(4 + 0.75 * len(columns), 2.2 + 0.24 * len(rows)), layout="constrained")
    image = ax.imshow(np.log2(values), cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="left")
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    for i, j in np.argwhere(np.isfinite(values)):
        colour = "white" if abs(np.log2(values[i, j])) > 2 else "black"
        ax.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", fontsize=7, color=colour)
    bar = fig.colorbar(image, ax=ax, location="bottom", shrink=0.8, aspect=40, pad=0.01)
    bar.set_ticks(range(-3, 4), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label(f"peer time / {OURS} time: blue where {OURS} is faster")
    fig.suptitle(f"Speed-up on the {results.platform}, mode {mode}")
    _save(fig, file)


_PANELS = {
    "tall": ("tall", "very tall"),
    "batches": ("tiny batch", "small batch", "medium batch"),
    "square and wide": ("square and wide",),
}


def _time_over_size(results: Results, dtype: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    drivers = ("gels", "gelsy", "gelsd")
    fig, axes = plt.subplots(
        len(_PANELS), len(drivers), figsize=(12, 10), layout="constrained", sharex="row", sharey="row"
    )
    for i, (title, groups) in enumerate(_PANELS.items()):
        for j, driver in enumerate(drivers):
            ax = axes[i, j]
            ax.set(xscale="log", yscale="log", title=f"{title}, {driver}")
            ax.grid(True, alpha=0.3)
            for peer in PEERS:
                points = sorted(
                    (case.work, 1e3 * record["minimum"])
                    for case in results.cases.values()
                    if case.group in groups
                    and case.dtype == dtype
                    and case.k == 1
                    and case.spectrum == "easy"
                    if (record := results.rival(case, peer, driver, "all")) and record.get("minimum")
                )
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", color=COLOURS[peer], label=peer, markersize=4)
            if not ax.lines:
                ax.set_visible(False)
        axes[i, 0].set_ylabel("ms a call, minimum")
    for ax in axes[-1]:
        ax.set_xlabel("operations of one QR of A")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles))
        fig.suptitle(f"Time over size, {dtype}, easy, one right-hand side, all outputs", x=0.02, ha="left")
        _save(fig, file)
    plt.close(fig)


def _save(fig, file: Path) -> None:
    import matplotlib.pyplot as plt

    fig.savefig(file, dpi=120)
    plt.close(fig)
    print(f"drawn: {file}")
