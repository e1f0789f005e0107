"""Language models as judges: rows rated by a rubric, through any endpoint that speaks OpenAI's protocol."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
