from .overview import Overview as Overview
from .plots import PLOTS as PLOTS
from .plots import Plot as Plot
from .questions import explain as explain
from .questions import what_if as what_if
from .report import SelectionReport as SelectionReport
from .rules import RuleFigures as RuleFigures
from .rules import compare_rules as compare_rules
