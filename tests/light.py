"""Compile faster than users do, on CPU: in one piece and, where it can, without XLA's MLIR emitters.

The options have no public name but XLA_FLAGS, which is of the whole process, and some tests compile as users
do. So this is the one place that reaches into JAX. Where that has moved the tests only take longer, and
`tests/test_autodiff.py::test_light_compilation` fails. Options come and go with XLA, which refuses those that
it does not know (the emitters are all that jax 0.11 has).
"""

from functools import cache

import jax

try:
    from jax._src import compiler

    _options = compiler.get_compile_options
except (ImportError, AttributeError):
    compiler = None

LIGHT = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
counted = []  # an entry for each light compilation


@cache
def known():
    """Those that this XLA takes."""
    compiler.get_compile_options = _options

    def accepted(name):
        try:
            jax.jit(lambda: 0).lower().compile(compiler_options={name: LIGHT[name]})
        except jax.errors.JaxRuntimeError as error:
            assert "No such compile option" in str(error)  # noqa: PT017
            return False
        return True

    taken = {name: value for name, value in LIGHT.items() if accepted(name)}
    install()
    return taken


def _get_compile_options(*args, **kwargs):
    options = _options(*args, **kwargs)
    light = jax.config.read("jax_disable_most_optimizations") and jax.default_backend() == "cpu"
    if light and hasattr(options, "env_option_overrides"):
        options.env_option_overrides = list((known() | dict(options.env_option_overrides or ())).items())
        counted.append(True)
    return options


def install():
    """For every compilation while `jax_disable_most_optimizations` is set."""
    if compiler is not None:
        compiler.get_compile_options = _get_compile_options
