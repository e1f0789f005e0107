"""How fast the package is beside a plain way of doing the same: `python -m tests.benchmarks`."""
