"""The named tuple that `jlstsq.lstsq` returns."""

from typing import NamedTuple

import jax


class LstsqResult(NamedTuple):
    """What a least-squares solve returns; shapes depend on input shapes and driver only."""

    solution: jax.Array  # (*batch, n, k), or (*batch, n) for a vector B
    residuals: jax.Array  # (*batch, k) real, squared 2-norms of A X - B; (0,) where m <= n
    rank: jax.Array  # batch_a, integer; (0,) for gels
    singular_values: jax.Array  # (*batch_a, min(m, n)) real, decreasing; (0,) for gels, gelsy
