"""PROVE: short fine-tunes of a small model on a selection and on its rivals, and what their losses say."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
