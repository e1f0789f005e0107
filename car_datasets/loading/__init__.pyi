from .schemas import SCHEMAS as SCHEMAS
from .schemas import Schema as Schema
from .sources import check_rows as check_rows
from .sources import load_instructions as load_instructions
from .sources import open_dataset as open_dataset
from .templates import Exchange as Exchange
from .templates import render as render
