"""Brief training of a module that a pass has changed: labels, a teacher, fair to groups."""

from graphopt.training.accuracy import Accuracy, accuracy_of
from graphopt.training.loop import train
from graphopt.training.objective import class_scores, distillation_loss, matching_loss
from graphopt.training.report import TrainingReport
from graphopt.training.statistics import recalibrate

__all__ = [
    "Accuracy",
    "TrainingReport",
    "accuracy_of",
    "class_scores",
    "distillation_loss",
    "matching_loss",
    "recalibrate",
    "train",
]
