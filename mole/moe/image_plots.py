"""Pictures of an image on its way through blocks: one panel per expert, with the patches that it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mole.figure import INK, MissingExtra, new_figure, panel
from mole.moe.block import MoEBlock
from mole.moe.images import as_images, masks_of, shown
from mole.moe.plots import head, labels_of, palette, shown_if, title_of
from mole.moe.statistics import chosen_ids
from mole.moe.targets import at_rest
from mole.registry import unknown
from mole.routing import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKENDS = ("matplotlib", "plotly")
FADED = 0.14  # what is left of the colour of patches that an expert did not get
SIDE, GAP = 2.3, 0.14  # inches: the longer side of a panel, the space between two
ACROSS = 6


def image_through_experts(
    image: Any,
    model: nn.Module,
    patch_size: int,
    *,
    num_prefix_tokens: int | str = "auto",
    preprocess: Callable[[Tensor], Tensor] | None = None,
    backend: str = "matplotlib",
    show: bool = False,
) -> dict[str, Any]:
    """Forwards the image once and draws each block that it met: title of the block → figure, in order of execution.

    `image` as of `as_images`, several make a row each. The model, in eval mode and on its own device, is given
    [B, 3, H, W] in 0 … 1, or what `preprocess` makes of it, whose height and width then count. `patch_size` in pixels;
    patches run row by row. `num_prefix_tokens` stand before them (class, registers); `auto` takes what is left over.

    Raises ValueError if the model has no block, or tokens and patches do not fit; MissingExtra for a backend that is
    not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown("backend", backend, BACKENDS))
    pictures = as_images(image)
    batch = torch.from_numpy(np.moveaxis(pictures, -1, 1).copy())
    if preprocess is not None:
        batch = preprocess(batch if len(batch) > 1 else batch[0])
        batch = batch[None] if batch.dim() == 3 else batch
        pictures = np.stack([as_images(one)[0] for one in batch])
    first = next(model.parameters(), torch.empty(0))
    with listening(model) as passed, at_rest(model):
        model(batch.to(first.device, first.dtype if first.is_floating_point() else batch.dtype))
    if not passed:
        raise ValueError(f"no MoE block of this {type(model).__name__} took part in its forward")
    size = (pictures.shape[1], pictures.shape[2])
    figures: dict[str, Any] = {}
    for title, block, routing in passed:
        masks = _masks(block, routing, len(pictures), size, patch_size, num_prefix_tokens)
        name, again = title, 2
        while name in figures:
            name, again = f"{title} ({again})", again + 1
        figures[name] = _drawn(pictures, masks, labels_of(block), name, backend, len(block.config.null_experts))
        if backend == "matplotlib":
            shown_if(figures[name], show)
        elif show:
            figures[name].show()
    return figures


def image_through_moe_block(
    image: Any, block: MoEBlock, patch_size: int, *, num_prefix_tokens: int | str = 0, show: bool = False
) -> Figure:
    """The image by what each expert got of it in the block's latest forward; `image` is what the model saw then.

    Raises RuntimeError before a forward, ValueError if tokens and patches do not fit.
    """
    if block.last is None:
        raise RuntimeError("no forward yet")
    pictures = as_images(image)
    size = (pictures.shape[1], pictures.shape[2])
    masks = _masks(block, block.last, len(pictures), size, patch_size, num_prefix_tokens)
    figure = draw_panels(pictures, masks, labels_of(block), title_of(block), nulls=len(block.config.null_experts))
    return shown_if(figure, show)


@contextmanager
def listening(model: nn.Module):
    """Inside the body every block that works is noted: title, block, routing; a block used twice is there twice."""
    blocks = {id(m): (name, m) for name, m in model.named_modules() if isinstance(m, MoEBlock)}
    if not blocks:
        raise ValueError(f"this {type(model).__name__} has no MoE block")
    titles = [title_of(block) for _, block in blocks.values()]
    passed: list[tuple[str, MoEBlock, Routing]] = []

    def note(block: MoEBlock, routing: Routing, mask: Tensor | None) -> None:
        title, name = title_of(block), blocks[id(block)][0]
        passed.append((f"{title}, {name}" if titles.count(title) > 1 and name else title, block, routing.detach()))

    for _, block in blocks.values():
        block.observers.append(note)
    try:
        yield passed
    finally:
        for _, block in blocks.values():
            block.observers.remove(note)


def _masks(
    block: MoEBlock, routing: Routing, images: int, size: tuple[int, int], patch_size: int, prefix: int | str
) -> np.ndarray:
    """[B, E', H, W]."""
    ids = chosen_ids(routing)
    if len(ids) != images:
        raise ValueError(f"{title_of(block)} routed {len(ids)} images, and {images} are to be drawn")
    columns = len(labels_of(block))
    return np.stack([masks_of(row, columns, size, patch_size, prefix) for row in ids])


# ---- drawing
def _drawn(pictures: np.ndarray, masks: np.ndarray, labels: Sequence[str], title: str, backend: str, nulls: int) -> Any:
    if backend == "plotly":
        return draw_with_plotly(pictures, masks, labels, title)
    return draw_panels(pictures, masks, labels, title, nulls=nulls)


def faded(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] where the mask is 1; elsewhere nearly white."""
    light = 1 - FADED + FADED * picture
    return np.where(mask[..., None] > 0, picture, light)


def draw_panels(
    pictures: np.ndarray, masks: np.ndarray, labels: Sequence[str], title: str, *, nulls: int = 0
) -> Figure:
    """A figure: for each picture [H, W, 3] a row of panels, one per expert; `masks` [B, E', H, W].

    More than six experts go on in the next line.
    """
    images, experts, height, width = masks.shape
    across = min(experts, ACROSS)
    lines = -(-experts // across)
    scale = SIDE / max(height, width)
    wide, high = width * scale, height * scale
    step_x, step_y = wide + GAP, high + 0.36
    top = images * lines * step_y + 0.15
    figure = new_figure(max(across * step_x + 0.4, 3.4), top + 0.75)
    shades = palette(experts, nulls)
    for image in range(images):
        for expert, mask in enumerate(masks[image]):
            line, column = divmod(expert, across)
            bottom = top - (image * lines + line + 1) * step_y
            axes = panel(figure, 0.2 + column * step_x, bottom, wide, high)
            axes.imshow(faded(shown(pictures[image]), mask), interpolation="nearest", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(shades[expert])
                spine.set_linewidth(2)
            axes.set_title(f"{labels[expert]}  {mask.mean():.1%}", fontsize=9, loc="left", color=INK, pad=4)
    what = "the patches that each expert got, and their share of the image"
    head(figure, title, what if images == 1 else f"{what}; one row per image")
    return figure


def draw_with_plotly(pictures: np.ndarray, masks: np.ndarray, labels: Sequence[str], title: str) -> Any:
    """The same as an interactive figure. Raises MissingExtra without plotly."""
    try:
        from plotly import graph_objects  # type: ignore[import-not-found]
        from plotly.subplots import make_subplots  # type: ignore[import-not-found]
    except ImportError:
        raise MissingExtra(
            "backend=plotly needs plotly, which is not installed: pip install 'mole-experts[plotly]'"
        ) from None
    images, experts = masks.shape[:2]
    titles = [f"{label}  {masks[i, e].mean():.1%}" for i in range(images) for e, label in enumerate(labels)]
    figure = make_subplots(rows=images, cols=experts, subplot_titles=titles, horizontal_spacing=0.01)
    for image in range(images):
        for expert in range(experts):
            picture = faded(shown(pictures[image]), masks[image, expert])
            drawn = graph_objects.Image(z=(picture * 255).round().astype(np.uint8))
            figure.add_trace(drawn, row=image + 1, col=expert + 1)
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    figure.update_layout(title=title, height=220 * images + 120, width=230 * experts + 60)
    return figure
