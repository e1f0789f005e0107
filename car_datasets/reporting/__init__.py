"""REPORT: figures, plots and pages of a selection, compared with random controls of the same size."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
