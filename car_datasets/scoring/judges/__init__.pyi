from .judge import JudgeScorer as JudgeScorer
from .rubric import Rubric as Rubric
