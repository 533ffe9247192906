"""The process of one library: requests come in as JSON lines, every one is answered by one line.

hello                            -> what runs here
prepare case driver mode seconds -> compile time, memory, and how many calls make a round of `seconds`
measure case driver mode calls   -> seconds of one call, the mean of a round
"""

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

from .cases import Case
from .peers import Prepared, make_peer


class Worker:
    def __init__(self, name: str, device: str):
        """Load the library."""
        self.peer = make_peer(name, device)
        self.case: Case | None = None
        self.prepared: dict[tuple[str, str], Prepared] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "hello":
            return self.peer.describe()
        prepared = self._prepared(Case(**request["case"]), request["driver"], request["mode"])
        if request["op"] == "prepare":
            return {
                "repetitions": _repetitions(prepared, request["seconds"]),
                "finite": prepared.finite,
                "compile_seconds": prepared.compile_seconds,
                "temporary_bytes": prepared.temporary_bytes,
            }
        if request["repetitions"] > 1:
            prepared.call()  # another library had the caches
        return {"seconds": _time(prepared, request["repetitions"])}

    def _prepared(self, case: Case, driver: str, mode: str) -> Prepared:
        if case != self.case:
            self.case, self.prepared = case, {}
            gc.collect()
        if (driver, mode) not in self.prepared:
            self.prepared[driver, mode] = self.peer.prepare(case, driver, mode)
        return self.prepared[driver, mode]


def _time(prepared: Prepared, repetitions: int) -> float:
    gc.disable()
    start = time.perf_counter()
    for _ in range(repetitions):
        prepared.call()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / repetitions


def _repetitions(prepared: Prepared, seconds: float) -> int:
    once = _time(prepared, 1)
    if once < seconds:
        once = _time(prepared, 3)
    return max(1, round(seconds / once + 0.5))


def main(name: str, device: str) -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(name, device)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
