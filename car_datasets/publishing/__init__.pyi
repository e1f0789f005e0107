from .exporting import export_selection as export_selection
from .push import push_selection as push_selection
from .verification import verify as verify
