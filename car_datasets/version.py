"""The version, in one place: setup.cfg reads it, and a result can name it."""

__version__ = "0.1.0"
