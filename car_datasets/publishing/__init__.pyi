from .push import push_selection as push_selection
from .verification import verify as verify
