"""Judging relevance: is it faithful to the model, and does it find what is known to matter?"""

from graphopt.passes.relevance.judging.baselines import blurred
from graphopt.passes.relevance.judging.curves import PerturbationCurves, perturbation_curves
from graphopt.passes.relevance.judging.estimate import Estimate, estimate, spearman
from graphopt.passes.relevance.judging.localisation import Localisation, localisation
from graphopt.passes.relevance.judging.occlusion import (
    infidelity,
    leave_one_out,
    leave_one_out_correlation,
    sensitivity_n,
)
from graphopt.passes.relevance.judging.randomisation import Randomisation, randomisation_check
from graphopt.passes.relevance.judging.removal import Removal

__all__ = [
    "Estimate",
    "Localisation",
    "PerturbationCurves",
    "Randomisation",
    "Removal",
    "blurred",
    "estimate",
    "infidelity",
    "leave_one_out",
    "leave_one_out_correlation",
    "localisation",
    "perturbation_curves",
    "randomisation_check",
    "sensitivity_n",
    "spearman",
]
