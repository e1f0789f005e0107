"""Pick the best and most diverse subset of an instruction-tuning dataset: CaR (Clustering and Ranking, EMNLP 2024).

Every stage is a small, picklable callable that adds columns to a `datasets.Dataset`. Names are loaded on first use:
importing this package imports neither torch nor transformers, which a spawned worker would pay for each time. The names
are listed in `__init__.pyi`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, _lazy_names, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*__all__, "__version__"])


def __dir__() -> list[str]:
    return __all__
