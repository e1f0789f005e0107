"""LOAD: open a source, recognise its schema, check its rows and render their texts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
