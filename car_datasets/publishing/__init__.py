"""PUSH and VERIFY: a selection as a dataset repository with card and receipt, and the check that it is what it says."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
