"""Define the version of the package, for its metadata and for receipts."""

__version__ = "0.1.0"
