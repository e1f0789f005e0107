"""SCORE and EMBED: callables that add columns, and the engines that run them in one process or many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
