"""The pictures that a run of training leaves, where matplotlib is there to draw them."""

import logging
from collections.abc import Sequence

from mole.analysis import CannotPlot, MissingExtra, plot_run
from mole.run_folder import RunFolder

logger = logging.getLogger(__name__)


def draw(run: RunFolder, plots: Sequence[str] | None = None) -> None:
    """Leaves plots/ with those that were named, or with all that the run's logs allow. Says so if it cannot."""
    try:
        plot_run(run.path, plots)
    except MissingExtra as missing:
        logger.warning("no plots: %s; then mole plot %s", missing, run.path)
    except CannotPlot as reason:
        logger.info("no plots: %s", reason)
