"""A run of all tests in two processes, which take one file after the other.

What takes time is tracing and compiling, on one core. pytest-xdist divides tests too, and better, but is not
among what the tests may need. The second process writes down its reports, and the first one counts them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import pytest

# The directory that both know: what is taken, and the reports.
_VARIABLE = "JLSTSQ_TESTS"
# Tests that are worth a process.
_MANY = 50


def _divided(config, items):
    """Whether it is: not where tests or how to stop are chosen, nor where the device is another."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or len(items) < _MANY
    stops = config.option.maxfail or config.option.usepdb or config.option.collectonly
    return not (chosen or stops) and jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1


class _Part:
    """Runs the tests of files that the other process has not taken."""

    def __init__(self, directory):
        self.directory, self.files = Path(directory), {}

    def _take(self, file):
        try:
            (self.directory / file.name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if item.path not in self.files:
            self.files[item.path] = self._take(item.path)
        return None if self.files[item.path] else True


class _Second(_Part):
    def __init__(self, config, directory):
        super().__init__(directory)
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with (self.directory / "reports").open("a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config):
    if _VARIABLE in os.environ:
        config.pluginmanager.register(_Second(config, os.environ[_VARIABLE]))


def _count(config, lines):
    """Counts the reports; the tests that ended."""
    ended = set()
    for line in lines:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            ended.add(report.nodeid)
    return ended


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    config = session.config
    if not _divided(config, session.items):
        return (yield)
    # The longest files first, so that both end at about the same time.
    count = Counter(item.path for item in session.items)
    session.items.sort(key=lambda item: (-count[item.path], item.path))
    if _VARIABLE in os.environ:
        return (yield)
    with tempfile.TemporaryDirectory() as directory:
        part = _Part(directory)
        config.pluginmanager.register(part)
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        reports, log = part.directory / "reports", part.directory / "log"
        with log.open("w") as out:
            second = subprocess.Popen(
                command, env=os.environ | {_VARIABLE: directory}, stdout=out, stderr=out, cwd=config.rootpath
            )
        try:
            result = yield
            second.wait()
        finally:
            second.kill()
        theirs = {item.nodeid for item in session.items if not part.files[item.path]}
        missing = theirs - _count(config, reports.read_text().splitlines() if theirs else ())
        if missing:
            raise RuntimeError(f"{len(missing)} tests did not end\n{log.read_text()[-5000:]}")
    return result
