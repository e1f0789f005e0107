from .questions import explain as explain
from .questions import what_if as what_if
from .report import SelectionReport as SelectionReport
