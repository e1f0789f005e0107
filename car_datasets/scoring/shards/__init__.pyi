from .run import fill_shards as fill_shards
from .run import score_in_shards as score_in_shards
