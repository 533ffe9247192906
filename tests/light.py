"""Compile faster than users do, on CPU: without XLA's MLIR emitters, in one piece.

The options have no public name but XLA_FLAGS, which is of the whole process, and some tests compile as users
do. So this is the one place that reaches into JAX. Where that has moved the tests only take longer, and
`tests/test_autodiff.py::test_light_compilation` fails.
"""

import jax

try:
    from jax._src import compiler

    _options = compiler.get_compile_options
except (ImportError, AttributeError):
    compiler = None

LIGHT = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
counted = []  # an entry for each light compilation


def _get_compile_options(*args, **kwargs):
    options = _options(*args, **kwargs)
    light = jax.config.read("jax_disable_most_optimizations") and jax.default_backend() == "cpu"
    if light and hasattr(options, "env_option_overrides"):
        options.env_option_overrides = list((LIGHT | dict(options.env_option_overrides or ())).items())
        counted.append(True)
    return options


def install():
    """For every compilation while `jax_disable_most_optimizations` is set."""
    if compiler is not None:
        compiler.get_compile_options = _get_compile_options
