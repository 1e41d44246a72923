"""Brief training of a module that a pass has changed: labels, a teacher, fair to groups."""

from graphopt.training.accuracy import Accuracy
from graphopt.training.loop import train
from graphopt.training.objective import class_scores, distillation_loss
from graphopt.training.report import TrainingReport

__all__ = ["Accuracy", "TrainingReport", "class_scores", "distillation_loss", "train"]
