"""The chart of both perturbation curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.charts import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by those who see fewer colours (Okabe and Ito 2008).
_STYLES = {"LeRF": ("#0072B2", "least relevant first"), "MoRF": ("#D55E00", "most relevant first")}


def draw(shares: Sequence[float], morf: Tensor, lerf: Tensor, label: str, title: str) -> Figure:
    """Mean curves with the band of their standard errors, the area between them shaded.

    Args:
        shares: Of the units that are removed, ``K + 1`` from 0 to 1.
        morf: ``(samples, K + 1)``.
        lerf: ``(samples, K + 1)``.
        label: Of the vertical axis.
        title: Above.

    Raises:
        UnsupportedError: matplotlib isn't installed.
    """
    figure = new_figure(4.8, 3.6, layout="constrained")
    axis = figure.subplots()
    percent = [100 * share for share in shares]
    means = {}
    for name, values in (("LeRF", lerf), ("MoRF", morf)):
        color, meaning = _STYLES[name]
        mean = means[name] = values.mean(0)
        axis.plot(percent, mean, color=color, label=f"{name}: {meaning}")
        if len(values) > 1:
            error = values.std(0) / math.sqrt(len(values))
            axis.fill_between(percent, mean - error, mean + error, color=color, alpha=0.25)
    axis.fill_between(percent, means["MoRF"], means["LeRF"], color="0.5", alpha=0.12)
    axis.set(xlabel="units removed, %", ylabel=label, xlim=(0, 100))
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    return figure
