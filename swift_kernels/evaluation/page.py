"""HTML pages that hold all they need, pictures and scripts included: they open without a network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OURS = "#0b5fa5"
OTHERS = (
    "#c44e52",
    "#dd8452",
    "#55a868",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#64b5cd",
    "#ccb974",
    "#4c4c4c",
    "#9467bd",
)
"""Of lines in pictures, in this order."""


def render(template: str, **context: Any) -> str:
    """The page made from a file of `templates/`; text is escaped, what `inline_svg` made is not.

    Raises:
        ImportError: jinja2 is not installed; the message names the extra.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("pages need jinja2: pip install 'swift_kernels[report]'") from error

    environment = Environment(
        loader=PackageLoader("swift_kernels.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def inline_svg(figure: Any, label: str | None = None) -> Any:
    """A matplotlib figure as an SVG element for a page; the figure is closed. `label` is what screen readers say."""
    from markupsafe import Markup
    from matplotlib import pyplot

    written = io.StringIO()
    # Without a date, and with ids that do not differ from run to run, the same figures give the same page.
    with pyplot.rc_context({"svg.fonttype": "path", "svg.hashsalt": "swift_kernels"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    if label is not None:
        text = text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1)
    return Markup(text)


@contextmanager
def drawing() -> Iterator[Any]:
    """Yields `matplotlib.pyplot` in the style of the pages, drawing to no screen.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'swift_kernels[report]'") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.constrained_layout.use": True,
    }
    with pyplot.rc_context(style):
        yield pyplot
