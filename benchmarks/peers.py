"""One small class per library: what it can run, and the prepared call that blocks until its result is there.

Libraries are imported when a peer is made, so that each process loads only its own.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .cases import Case, problem


class Prepared(NamedTuple):
    call: Callable[[], Any]
    finite: bool  # whether all the numbers it returns are
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


class Peer:
    name = ""
    packages: tuple[str, ...] = ()
    platform = "cpu"
    device = "cpu"
    threads = os.cpu_count()

    def __init__(self, device: str):
        """Load the library, for `device` "cpu" or "auto"."""

    def describe(self) -> dict[str, Any]:
        versions = {package: importlib.metadata.version(package) for package in self.packages}
        return {
            "versions": {**versions, "numpy": np.__version__},
            "platform": self.platform,
            "device": self.device,
            "threads": self.threads,
        }

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        """The modes it runs, by driver. Needs nothing of the library."""
        raise NotImplementedError

    @staticmethod
    def rival(driver: str, platform: str) -> str | None:
        """Which of its drivers jlstsq's `driver` is compared with."""
        return driver

    def prepare(self, case: Case, driver: str, mode: str) -> Prepared:
        raise NotImplementedError


class _Jax(Peer):
    """A function of device arrays A and B, compiled ahead of time; the eager call takes them as well."""

    def __init__(self, device: str):
        """Switch double precision on and compile something; the runner's environment sets the device."""
        import jax

        jax.config.update("jax_enable_x64", True)
        self.platform = jax.default_backend()
        self.device = jax.devices()[0].device_kind
        # The first compilations of a process take longer: what they load is no part of a case.
        small = Case("", 0, 3, 2)
        for driver, modes in self.offers(small, self.platform).items():
            self.prepare(small, driver, modes[-1])

    def function(self, case: Case, driver: str) -> Callable[..., tuple]:
        """All outputs of a call, the solution first."""
        raise NotImplementedError

    def prepare(self, case: Case, driver: str, mode: str) -> Prepared:
        import jax
        import jax.numpy as jnp

        fun = self.function(case, driver)

        def solution(A, B):
            return fun(A, B)[0]

        def loss(A, B):
            x = solution(A, B)
            return jnp.vdot(x, x).real

        used = {"all": fun, "solution": solution, "gradient": jax.value_and_grad(loss, (0, 1))}[mode]
        arrays = jax.block_until_ready(jax.device_put(problem(case)))

        jax.clear_caches()  # otherwise the second mode finds the first one's traces
        start = time.perf_counter()
        compiled = jax.jit(used).lower(*arrays).compile()
        compile_seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()

        run = fun if case.eager else compiled
        leaves = jax.tree.leaves(run(*arrays))
        return Prepared(
            lambda: jax.block_until_ready(run(*arrays)),
            all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves),
            compile_seconds,
            None if memory is None else memory.temp_size_in_bytes,
        )


class Jlstsq(_Jax):
    name = "jlstsq"
    packages = ("jax", "jaxlib")

    def describe(self) -> dict[str, Any]:
        import jlstsq

        described = super().describe()
        described["versions"]["jlstsq"] = jlstsq.__version__
        return described

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(("gels", "gelsy", "gelsd", "gelss"), case.modes)

    def function(self, case: Case, driver: str) -> Callable[..., tuple]:
        from jlstsq import lstsq

        return lambda A, B: lstsq(A, B, driver=driver)


class Jnp(_Jax):
    """jnp.linalg.lstsq has one method, an SVD of A, and takes single matrices: batches are vmapped."""

    name = "jnp"
    packages = ("jax", "jaxlib")

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        return {"svd": case.modes}

    @staticmethod
    def rival(driver: str, platform: str) -> str | None:
        return "svd"

    def function(self, case: Case, driver: str) -> Callable[..., tuple]:
        import jax
        import jax.numpy as jnp

        return jax.vmap(jnp.linalg.lstsq) if case.batch else jnp.linalg.lstsq


class Lineax(_Jax):
    """Lineax solves for one vector: columns of B (they share A's factors) and batches are vmapped."""

    name = "lineax"
    packages = ("lineax", "jax", "jaxlib")

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        return {"qr": tuple(mode for mode in case.modes if mode != "solution")}

    @staticmethod
    def rival(driver: str, platform: str) -> str | None:
        return "qr" if driver == "gels" else None

    def function(self, case: Case, driver: str) -> Callable[..., tuple]:
        import jax
        import lineax

        def solve(A, b):
            operator = lineax.MatrixLinearOperator(A)
            # throw would add a check on the host that no other peer makes
            return lineax.linear_solve(operator, b, lineax.QR(), throw=False).value

        def single(A, B):
            if case.k == 1:
                return (solve(A, B[:, 0])[:, None],)
            return (jax.vmap(solve, (None, 1), 1)(A, B),)

        return jax.vmap(single) if case.batch else single


class Scipy(Peer):
    name = "scipy"
    packages = ("scipy",)

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        return {} if case.batch else {"gelsy": ("all",), "gelsd": ("all",), "gelss": ("all",)}

    def prepare(self, case: Case, driver: str, mode: str) -> Prepared:
        from scipy.linalg import lstsq

        A, B = problem(case)

        def call():
            return lstsq(A, B, lapack_driver=driver, check_finite=False)

        return Prepared(call, bool(np.isfinite(call()[0]).all()))  # pyright: ignore[reportOptionalSubscript]


class Torch(Peer):
    """torch.linalg.lstsq; its one call returns what the driver gives, so there is no solution-only mode."""

    name = "torch"
    packages = ("torch",)

    def __init__(self, device: str):
        """Take CUDA where it is, unless the device is to be the cpu."""
        import torch

        self.threads = torch.get_num_threads()
        if device != "cpu" and torch.cuda.is_available():
            self.platform, self.device = "gpu", torch.cuda.get_device_name()

    @staticmethod
    def offers(case: Case, platform: str) -> dict[str, tuple[str, ...]]:
        drivers = ("gels", "gelsy", "gelsd", "gelss") if platform == "cpu" else ("gels",)
        return dict.fromkeys(drivers, tuple(mode for mode in case.modes if mode != "solution"))

    @staticmethod
    def rival(driver: str, platform: str) -> str | None:
        return driver if platform == "cpu" else "gels"

    def prepare(self, case: Case, driver: str, mode: str) -> Prepared:
        import torch

        cuda = self.platform == "gpu"
        A, B = (torch.from_numpy(x).to("cuda" if cuda else "cpu") for x in problem(case))
        if mode == "gradient":
            A, B = A.clone().requires_grad_(), B.clone().requires_grad_()

        def run():
            result = torch.linalg.lstsq(A, B, driver=driver)
            if mode != "gradient":
                return (result.solution,)
            value = torch.linalg.vector_norm(result.solution).square()
            return (value.detach(), *torch.autograd.grad(value, (A, B)))

        def call():
            result = run()
            if cuda:
                torch.cuda.synchronize()
            return result

        return Prepared(call, all(bool(torch.isfinite(x).all()) for x in call()))


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Jlstsq, Torch, Jnp, Scipy, Lineax)}


def make_peer(name: str, device: str) -> Peer:
    return PEERS[name](device)


def gradient_bytes(peer: str, case: Case) -> int:
    """Size of the m x m array in PyTorch's backward, the product with the pseudoinverse."""
    if peer != "torch":
        return 0
    return max(case.batch, 1) * case.m**2 * np.dtype(case.dtype).itemsize
