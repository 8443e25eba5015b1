"""Routings of whole examples: made while the prompt is read, kept while `generate` goes on."""

from __future__ import annotations

from collections.abc import Callable

from mole.routing import Frame, Routing


def kept(frame: Frame, place: str, rows: int, make: Callable[[], Routing]) -> Routing:
    """The routing of `place` (a module, or "" for the model) for a batch of `rows`, by `make()` where there is none.

    Several beams or sequences of one prompt share its values. Raises ValueError for a forward that continues a cache
    outside `generate`: the prompt is gone.
    """
    if not frame.generating:
        if frame.goes_on:
            raise ValueError(
                "this router reads the prompt, and a forward that continues a cache does not see it: use generate(), "
                "or pass the whole text"
            )
        return make()
    if place not in frame.kept:  # without a cache, later forwards hold more than the prompt
        frame.kept[place] = make()
    return frame.kept[place].for_rows(rows)
