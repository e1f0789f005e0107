"""The marks by which rows are kept, left out or ranked: pins, duplicates, contamination, examples, tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
