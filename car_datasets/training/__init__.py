"""Make training pairs, train a scorer, measure it, and quantise its encoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
