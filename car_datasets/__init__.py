"""Pick the best and most diverse subset of an instruction-tuning dataset: CaR (Clustering and Ranking, EMNLP 2024).

Every stage is a small, picklable callable that adds columns to a `datasets.Dataset`. Names are loaded on first use (PEP
562): importing this package imports neither torch nor transformers, which a spawned worker would pay for each time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from car_datasets.version import __version__

if TYPE_CHECKING:
    from car_datasets.alternatives import what_if
    from car_datasets.clustering import ClusterModel
    from car_datasets.configuration_iqs import IQSConfig
    from car_datasets.curation import curate
    from car_datasets.embedding import TextEmbedder
    from car_datasets.explaining import explain
    from car_datasets.filtering import cluster_filter
    from car_datasets.loading import load_instructions
    from car_datasets.modeling_iqs import IQSModel
    from car_datasets.parallel import map_across_gpus
    from car_datasets.pushing import push_selection
    from car_datasets.receipt import Receipt
    from car_datasets.recipe import Recipe
    from car_datasets.reporting import SelectionReport
    from car_datasets.scoring import QualityScorer
    from car_datasets.selection import select_car
    from car_datasets.shards import score_in_shards
    from car_datasets.streaming import select_car_streaming
    from car_datasets.verification import verify

_HOME = {
    "ClusterModel": "clustering",
    "IQSConfig": "configuration_iqs",
    "IQSModel": "modeling_iqs",
    "QualityScorer": "scoring",
    "Receipt": "receipt",
    "Recipe": "recipe",
    "SelectionReport": "reporting",
    "TextEmbedder": "embedding",
    "cluster_filter": "filtering",
    "curate": "curation",
    "explain": "explaining",
    "load_instructions": "loading",
    "map_across_gpus": "parallel",
    "push_selection": "pushing",
    "score_in_shards": "shards",
    "select_car": "selection",
    "select_car_streaming": "streaming",
    "verify": "verification",
    "what_if": "alternatives",
}

__all__ = [
    "ClusterModel",
    "IQSConfig",
    "IQSModel",
    "QualityScorer",
    "Receipt",
    "Recipe",
    "SelectionReport",
    "TextEmbedder",
    "__version__",
    "cluster_filter",
    "curate",
    "explain",
    "load_instructions",
    "map_across_gpus",
    "push_selection",
    "score_in_shards",
    "select_car",
    "select_car_streaming",
    "verify",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
