"""The IQS model: its configuration, its forward pass, and the conversion of the original's checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
