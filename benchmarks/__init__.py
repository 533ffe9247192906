"""Side-by-side timings of jlstsq, PyTorch, jax.numpy, SciPy and lineax; see README.md beside this file."""
