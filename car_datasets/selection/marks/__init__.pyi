from .contamination import Decontaminator as Decontaminator
from .duplicates import duplicate_losses as duplicate_losses
from .duplicates import mark_duplicates as mark_duplicates
from .examples import rank_by_examples as rank_by_examples
from .pins import mark_pins as mark_pins
