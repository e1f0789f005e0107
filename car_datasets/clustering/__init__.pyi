from .model import ClusterModel as ClusterModel
