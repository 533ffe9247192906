"""`python -m benchmarks run | report | floors | list`."""

import argparse
from datetime import datetime
from pathlib import Path

from . import floors, report, runner
from .cases import DRIVERS, MODES, select
from .peers import PEERS

RESULTS = Path(__file__).resolve().parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="parts of names, or globs")
    cases.add_argument(
        "--quick", action="store_true", help="3 short rounds; without --cases one case a group"
    )

    commands.add_parser("list", parents=[cases], help="the names of the cases")

    run = commands.add_parser("run", parents=[cases], help="measure")
    run.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    run.add_argument(
        "--drivers",
        nargs="+",
        default=DRIVERS[:3],
        choices=DRIVERS,
        help="default: all but gelss, which is gelsd on the CPU",
    )
    run.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    run.add_argument("--rounds", type=int, help="default 7")
    run.add_argument("--device", choices=("auto", "cpu"), default="auto")
    run.add_argument("--patience", type=float, default=10.0, help="seconds of rounds, then one sits out")
    run.add_argument("--limit", type=float, default=120.0, help="seconds on a case, then one has failed")
    run.add_argument("--gradient-gigabytes", type=float, default=4.0, help="PyTorch's m x m array at most")
    run.add_argument(
        "--output", type=Path, metavar="FILE", help="default: a dated file in benchmarks/results"
    )
    run.add_argument("--resume", action="store_true", help="keep the cases that are in FILE")

    show = commands.add_parser("report", help="ratios of what was measured")
    floor = commands.add_parser("floors", help="what was measured over what this machine allows")
    for command in (show, floor):
        command.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: the newest result")
    show.add_argument("--pictures", type=Path, metavar="DIR", help="draw into this folder")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.command in ("report", "floors"):
        newest = sorted(RESULTS.glob("*.json"), key=lambda file: file.stat().st_mtime)[-1:]
        files = options.files or newest
        if not files:
            parser.error(f"no results in {RESULTS}")
        if options.command == "report":
            report.report(files, options.pictures)
        else:
            floors.report(files)
        return
    cases = select(options.cases, options.quick)
    if not cases:
        parser.error(f"no case matches {' '.join(options.cases)}")
    if options.command == "list":
        print("\n".join(f"{case.name:32} {case.group}" for case in cases))
        return
    measured = runner.Options(
        drivers=tuple(options.drivers),
        modes=tuple(options.modes),
        peers=tuple(options.peers),
        rounds=options.rounds or (3 if options.quick else 7),
        round_seconds=0.01 if options.quick else 0.05,
        patience=options.patience,
        limit=options.limit,
        gradient_gigabytes=options.gradient_gigabytes,
        device=options.device,
    )
    output = options.output or RESULTS / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
    runner.run(cases, measured, output, options.resume)


if __name__ == "__main__":
    main()
