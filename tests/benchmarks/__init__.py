"""Compare the speed of the package with a plain way of doing the same: `python -m tests.benchmarks`."""
