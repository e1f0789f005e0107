from .alternatives import what_if as what_if
from .explaining import explain as explain
from .report import SelectionReport as SelectionReport
