from .fitting import FitSettings as FitSettings
from .fitting import Numbers as Numbers
from .model import ENGINES as ENGINES
from .model import ClusterModel as ClusterModel
