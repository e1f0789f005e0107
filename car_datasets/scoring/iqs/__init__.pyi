from .configuration_iqs import IQSConfig as IQSConfig
from .modeling_iqs import IQSModel as IQSModel
from .quantisation import quantise_encoder as quantise_encoder
