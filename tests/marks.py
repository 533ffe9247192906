"""Which parameters the default run leaves to the slow one."""

import pytest


def slow(*values):
    """Values of one parameter."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_cases(*cases):
    """Values of several parameters."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
