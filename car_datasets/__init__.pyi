from .clustering import ClusterModel as ClusterModel
from .curation import curate as curate
from .loading import load_instructions as load_instructions
from .proving import prove as prove
from .publishing import push_selection as push_selection
from .publishing import verify as verify
from .receipt import Receipt as Receipt
from .recipe import Recipe as Recipe
from .reporting import SelectionReport as SelectionReport
from .reporting import explain as explain
from .reporting import what_if as what_if
from .scoring import QualityScorer as QualityScorer
from .scoring import Stage as Stage
from .scoring import TextEmbedder as TextEmbedder
from .scoring import map_across_gpus as map_across_gpus
from .scoring import score_in_shards as score_in_shards
from .scoring.iqs import IQSConfig as IQSConfig
from .scoring.iqs import IQSModel as IQSModel
from .selection import Decontaminator as Decontaminator
from .selection import cluster_filter as cluster_filter
from .selection import select_car as select_car
from .selection import select_car_streaming as select_car_streaming
from .topping_up import top_up as top_up
from .utils.column_names import ColumnNames as ColumnNames
from .utils.files import sample_file as sample_file

__version__: str
