"""What all charts share: a figure without a window, and colours that can be told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by those who see fewer colours (Okabe and Ito 2008), and by shape in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX"


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure of so many inches; no window opens and no global state is touched.

    Raises:
        UnsupportedError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a plot needs matplotlib, which isn't installed", hint="pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure
