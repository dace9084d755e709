"""How every figure looks, and how it becomes files: the same bytes from the same store."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.aside import shared_out

# Okabe and Ito's palette without its yellow: told apart by readers with any colour vision, and in grey by the markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
"""One more than there are colours, so that the pairs repeat late."""
GOOD, BAD = COLORS[0], COLORS[1]
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
    "axes.titley": 1.0,  # no ticks at the top: nothing for a title to make way for, at each drawing
    "svg.hashsalt": "sparseforge",
    "pdf.fonttype": 42,  # letters stay letters: publishers refuse type 3
}
Pictures = dict[str, bytes]
"""The files of one figure, by ending."""
# No date, no version: the same store gives the same bytes.
FORMATS: dict[str, dict[str, Any]] = {
    ".svg": {"metadata": {"Date": None, "Creator": None}},
    ".pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    ".png": {"dpi": 200, "metadata": {"Software": None}},
}


def get_ready() -> None:
    """Import what draws, with its fonts: once here instead of once in each process that draws."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_pdf
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """An empty figure in our style, in inches; it is laid out when the block ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
        yield figure
        figure.get_layout_engine().execute(figure)  # once for all formats
        figure.set_layout_engine(None)


def plain(axes: Any, grid: str) -> None:
    """Two spines and a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Any, ending: str) -> bytes:
    """A figure as the bytes of a file."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=ending[1:], **FORMATS[ending])
    return buffer.getvalue()


def pictures(drawing: Any, endings: Sequence[str] = tuple(FORMATS)) -> Pictures:
    """A figure as the bytes of its files, by ending; `drawing` holds its numbers and draws itself."""
    figure = drawing.draw()
    return {ending: save(figure, ending) for ending in endings}


def drawn(drawings: Mapping[str, Any]) -> dict[str, Pictures]:
    """The files of several figures, by name; a second process that shares what `get_ready` did draws some of them."""
    return dict(zip(drawings, shared_out("the figures", pictures, list(drawings.values())), strict=True))
