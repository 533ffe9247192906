"""Measure: one process per library, all alive during a case, one of them working at a time.

A contestant is a library with one of its drivers and one mode. All contestants of a case are prepared
(compiled, warmed up), then timed in turns, round by round, so that a slow minute of the machine hits all
of them alike. The results are written after every case.
"""

import json
import os
import platform as host
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from .cases import Case
from .peers import PEERS, gradient_bytes

ROOT = Path(__file__).resolve().parents[1]

# Seconds in which a library loads and compiles its first programs, which is no case's time.
STARTING = 120.0


@dataclass(frozen=True)
class Options:
    drivers: Sequence[str]
    modes: Sequence[str]
    peers: Sequence[str]
    rounds: int
    round_seconds: float  # a round repeats the call until it takes this long
    patience: float  # seconds of rounds after which a contestant sits out
    limit: float  # seconds after which it has failed
    gradient_gigabytes: float
    device: str


@dataclass
class Contestant:
    peer: str
    driver: str
    mode: str
    status: str = "ok"
    message: str = ""
    repetitions: int = 0
    finite: bool = True
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    used: float = 0.0

    def record(self, case: Case) -> dict[str, Any]:
        record = {"case": case.name, **asdict(self)}
        del record["used"]
        if self.seconds:
            record |= {"minimum": min(self.seconds), "median": median(self.seconds)}
        # Digits beyond the fourth are noise, and fill the files.
        return {k: _rounded(v) if isinstance(v, (float, list)) else v for k, v in record.items()}


def _rounded(value: float | list[float]) -> float | list[float]:
    return [float(f"{v:.4g}") for v in value] if isinstance(value, list) else float(f"{value:.4g}")


class WorkerFailedError(Exception):
    pass


class Process:
    """A library's worker, to be started before it is asked, and again after it was lost."""

    def __init__(self, peer: str, device: str):
        """Nothing runs yet."""
        self.peer, self.device = peer, device
        self.process: subprocess.Popen | None = None

    def start(self) -> dict[str, Any]:
        """What the library says of itself; the worker runs after that."""
        if self.process is None:
            self.process = self._start()
            self.described = self.ask(STARTING, op="hello")
        return self.described

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """The worker's answer; WorkerFailedError where it raises, dies or takes longer than `limit`."""
        assert self.process is not None
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write((json.dumps(request) + "\n").encode())
            stdin.flush()
            if not select.select([stdout], [], [], max(limit, 0))[0]:
                raise WorkerFailedError(f"took more than {limit:.0f} s")
            answer = json.loads(stdout.readline() or self._ended())
        except BrokenPipeError:
            answer = json.loads(self._ended())
        except BaseException:
            self.stop()
            raise
        if "error" in answer:
            self.stop()  # the library may be in any state
            raise WorkerFailedError(answer["error"])
        return answer

    def _ended(self) -> str:
        assert self.process is not None
        status = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return json.dumps({"error": ": ".join([f"the process ended with status {status}", *last])})

    def _start(self) -> subprocess.Popen:
        environment = dict(os.environ)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the device
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile times are measured
        if self.device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", self.peer, self.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None


def run(cases: Sequence[Case], options: Options, output: Path, resume: bool) -> None:
    """Measure the cases and write `output` after each; `resume` keeps the cases that are in it."""
    processes = {peer: Process(peer, options.device) for peer in PEERS if peer in options.peers}
    try:
        described = _start_all(processes, options)
        platform = next(iter(described.values()))["platform"]
        results = {"meta": _meta(options, platform), "peers": described, "cases": {}, "records": []}
        if resume and output.exists():
            kept = json.loads(output.read_text())
            results |= {"cases": kept["cases"], "records": kept["records"]}
        output.parent.mkdir(parents=True, exist_ok=True)
        todo = [case for case in cases if case.name not in results["cases"]]
        start = time.monotonic()
        for i, case in enumerate(todo):
            print(f"[{i + 1}/{len(todo)}] {case.name} ", end="", flush=True)
            contestants = measure(case, processes, platform, options)
            results["cases"][case.name] = asdict(case)
            results["records"] += [contestant.record(case) for contestant in contestants]
            _write(output, results)
            elapsed = time.monotonic() - start
            left = elapsed / (i + 1) * (len(todo) - i - 1)
            print(f" {elapsed:.0f} s, about {left:.0f} s left", flush=True)
            for contestant in contestants:
                print("   ", _line(contestant), flush=True)
    finally:
        for process in processes.values():
            process.stop()
    print(f"written to {output}")


def _start_all(processes: dict[str, Process], options: Options) -> dict[str, dict[str, Any]]:
    """What every library says of itself; those that do not start or run on another platform are left out."""
    described: dict[str, dict[str, Any]] = {}
    for peer in list(processes):
        try:
            answer = processes[peer].start()
        except WorkerFailedError as error:
            print(f"{peer} does not start, left out: {error}")
            del processes[peer]
            continue
        platform = next(iter(described.values()), answer)["platform"]
        if answer["platform"] == platform:
            described[peer] = answer
        else:
            print(f"{peer} runs on the {answer['platform']}, not on the {platform}: left out")
            processes.pop(peer).stop()
    if not described:
        raise SystemExit("no library starts")
    return described


def measure(case: Case, processes: dict[str, Process], platform: str, options: Options) -> list[Contestant]:
    """Prepare all contestants of a case, then time them in turns; a dot per preparation and per round."""
    contestants = _contestants(case, list(processes), platform, options)

    def ask(contestant: Contestant, op: str, **request: Any) -> dict[str, Any] | None:
        request |= {"op": op, "case": asdict(case), "driver": contestant.driver, "mode": contestant.mode}
        process = processes[contestant.peer]
        try:
            process.start()  # where it was lost, which is not this contestant's time
            start = time.monotonic()
            try:
                return process.ask(options.limit - contestant.used, **request)
            finally:
                contestant.used += time.monotonic() - start
        except WorkerFailedError as error:
            contestant.status, contestant.message = "failed", str(error)
            return None

    for contestant in contestants:
        if contestant.status == "ok" and (
            prepared := ask(contestant, "prepare", seconds=options.round_seconds)
        ):
            for name, value in prepared.items():
                setattr(contestant, name, value)
        print(".", end="", flush=True)

    print(" ", end="")
    for turn in range(options.rounds):
        # No library always follows the same other one.
        first = turn % max(len(contestants), 1)
        for contestant in contestants[first:] + contestants[:first]:
            spent = sum(contestant.seconds) * contestant.repetitions
            if contestant.status != "ok" or spent > options.patience:
                continue
            time.sleep(0.01)  # the other library's waiting threads go to sleep
            if answer := ask(contestant, "measure", repetitions=contestant.repetitions):
                contestant.seconds.append(answer["seconds"])
        print(".", end="", flush=True)
    return contestants


def _contestants(case: Case, peers: Sequence[str], platform: str, options: Options) -> list[Contestant]:
    found = []
    for peer in peers:
        wanted = {PEERS[peer].rival(driver, platform) for driver in options.drivers if case.allows(driver)}
        for driver, modes in PEERS[peer].offers(case, platform).items():
            if driver in wanted and case.allows(driver):
                found += [Contestant(peer, driver, mode) for mode in modes if mode in options.modes]
    for contestant in found:
        size = gradient_bytes(contestant.peer, case) / 1e9
        if contestant.mode == "gradient" and size > options.gradient_gigabytes:
            contestant.status = "skipped"
            contestant.message = f"the backward pass forms an m x m array of {size:.0f} GB"
    return found


def _meta(options: Options, platform: str) -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "platform": platform,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{host.system()} {host.machine()}",
        "python": host.python_version(),
        "environment": {
            k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS") or k == "XLA_FLAGS"
        },
        "options": asdict(options),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return host.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _write(output: Path, results: dict[str, Any]) -> None:
    """Replace the file at once, so that an interruption leaves a whole one."""
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    partial.replace(output)


def _line(contestant: Contestant) -> str:
    who = f"{contestant.peer:7} {contestant.driver:6} {contestant.mode:9}"
    if contestant.seconds:
        return f"{who} {1e3 * min(contestant.seconds):10.3f} ms  {contestant.message}".rstrip()
    return f"{who} {contestant.status}: {contestant.message}"
