from .arms import draw_arms as draw_arms
from .arms import hold_out as hold_out
from .arms import read_pool as read_pool
from .proof import prove as prove
from .statistics import compare as compare
