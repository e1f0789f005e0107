<<<<<<< HEAD
from .duplicates import duplicate_losses as duplicate_losses
from .duplicates import mark_duplicates as mark_duplicates
=======
from .contamination import Decontaminator as Decontaminator
>>>>>>> c
from .one_call import cluster_filter as cluster_filter
from .one_call import select_car_streaming as select_car_streaming
from .procedures import PROCEDURES as PROCEDURES
from .procedures import Amounts as Amounts
from .procedures import Procedure as Procedure
from .published import select_as_published as select_as_published
from .rule import choose as choose
from .rule import select_car as select_car
