"""The safe-ratio curve as a picture: curve.svg, the same bytes for the same numbers.

matplotlib's SVG canvas is used directly, without pyplot and its global state; ids are salted with a constant
and the date is left out, so that a rebuilt plan keeps its digest.
"""

from io import StringIO
from typing import Any

from moe_edge.planning.curve import DOUBTFUL_KL_NATS, Curve

SIZE_INCHES = (6.4, 3.6)
SALT = "moe-edge"


def curve_svg(curve: Curve, limit_nats: float, chosen: int | None = None) -> str:
    """The curve with the limit and, where given, the chosen count as a marked point."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE_INCHES, layout="tight")
        axes = figure.add_subplot()
        experts = [point.experts for point in curve.points]
        axes.plot(experts, [point.kl_nats for point in curve.points], "o-", color="#1f5fa8")
        for point in curve.points:
            if point.kl_nats_ci95:
                axes.vlines(point.experts, *point.kl_nats_ci95, color="#1f5fa8", alpha=0.5)
        _limits(axes, curve, limit_nats)
        if chosen is not None:
            axes.plot([chosen], [curve.kl_nats(chosen)], "D", color="#c0392b", label=f"chosen: {chosen}", zorder=3)
        axes.set_xlabel(f"experts kept per layer, of {curve.experts_total} (top-{curve.top_k})")
        axes.set_ylabel("masked KL, nats per token")
        axes.set_title(f"Keeping fewer experts, chosen by {curve.criterion}, before recovery")
        axes.set_xlim(max(experts) + 0.5, min(experts) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        stream = StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _limits(axes: Any, curve: Curve, limit_nats: float) -> None:
    """Horizontal lines, but only those near the curve: a limit far above would flatten it."""
    highest = max(point.kl_nats for point in curve.points)
    for nats, style, text in (
        (DOUBTFUL_KL_NATS, ":", "doubtful"),
        (limit_nats, "--", "limit"),
    ):
        if nats <= 2 * highest:
            axes.axhline(nats, linestyle=style, color="#7f7f7f", label=f"{text}: {nats:g} nats")
