"""Images as plots and models want them, and which of their pixels an expert got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole.moe.block import MoEBlock
from mole.moe.statistics import chosen_ids

MOST_PREFIX_TOKENS = 8  # class and register tokens that stand before the patches
CHANNELS = (1, 3, 4)


def as_images(image: Any) -> np.ndarray:
    """One or several images as float32 [B, H, W, 3] in 0 … 1.

    `image`: numpy or tensor; [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4 (alpha is dropped), a batch of such
    with one axis more, or a list of them, all of one size; bytes, or floats, which are taken as they are. Raises
    ValueError for anything else.
    """
    if isinstance(image, list | tuple):
        each = [as_images(one)[0] for one in image]
        if len({one.shape for one in each}) != 1:
            raise ValueError(f"images of one size are needed, got {sorted({one.shape[:2] for one in each})}")
        return np.stack(each)
    channels_first = isinstance(image, Tensor)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 4:
        return as_images([torch.from_numpy(one) if channels_first else one for one in array])
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not {array.shape[0], array.shape[-1]} & set(CHANNELS):
        raise ValueError(f"an image is [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got {list(array.shape)}")
    if array.shape[-1] not in CHANNELS or (channels_first and array.shape[0] in CHANNELS):
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    elif array.dtype.kind not in "f":
        raise ValueError(f"an image has bytes (uint8) or floats, got {array.dtype}")
    array = array[..., :3] if array.shape[-1] == 4 else array
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array
    return array.astype(np.float32)[None]


def shown(image: np.ndarray) -> np.ndarray:
    """The image with values that can be drawn: those outside 0 … 1 (a normalised one) are brought into it."""
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return image
    return (image - low) / max(high - low, 1e-12)


def grid_of(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError if they do not cover the image exactly."""
    height, width = image_size
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} × {width} pixels is no whole number of patches of {patch_size}")
    return height // patch_size, width // patch_size


def prefix_tokens(tokens: int, grid: tuple[int, int], given: int | str) -> int:
    """The tokens before the patches, of `tokens` in all. Raises ValueError if they do not fit the grid."""
    patches = grid[0] * grid[1]
    if given == "auto":
        found = tokens - patches
        if not 0 <= found <= MOST_PREFIX_TOKENS:
            raise ValueError(
                f"{tokens} tokens and {grid[0]} × {grid[1]} = {patches} patches do not fit together (0 … "
                f"{MOST_PREFIX_TOKENS} tokens may stand before the patches): is patch_size right?"
            )
        return found
    if isinstance(given, str) or given < 0 or tokens - given != patches:
        raise ValueError(
            f"num_prefix_tokens={given}: {tokens} tokens without them are not the {grid[0]} × {grid[1]} = {patches} "
            "patches"
        )
    return given


def make_expert_mask(patch_ids: Iterable[int], image_size: tuple[int, int], patch_size: int) -> np.ndarray:
    """uint8 [H, W], 1 in the patches with these numbers: row by row from the upper left, from 0.

    Raises ValueError for a number beyond the grid.
    """
    rows, columns = grid_of(image_size, patch_size)
    cells = np.zeros(rows * columns, dtype=np.uint8)
    for patch in patch_ids:
        if not 0 <= patch < len(cells):
            raise ValueError(f"patch {patch}: an image of {rows} × {columns} patches has 0 … {len(cells) - 1}")
        cells[patch] = 1
    return np.kron(cells.reshape(rows, columns), np.ones((patch_size, patch_size), dtype=np.uint8))


def make_experts_masks(
    block: MoEBlock,
    image_size: tuple[int, int],
    patch_size: int,
    *,
    num_prefix_tokens: int | str = 0,
    row: int = 0,
) -> np.ndarray:
    """uint8 [E', H, W]: what each expert got of image `row` in the block's latest forward, the null experts last.

    Raises RuntimeError before a forward, ValueError if tokens and patches do not fit.
    """
    if block.last is None:
        raise RuntimeError("no forward yet")
    return masks_of(chosen_ids(block.last)[row], block.num_choices, image_size, patch_size, num_prefix_tokens)


def masks_of(
    ids: Tensor, columns: int, image_size: tuple[int, int], patch_size: int, num_prefix_tokens: int | str
) -> np.ndarray:
    """uint8 [E', H, W] of the experts `ids` [T, K] of one image; with T = 1 the whole image went one way."""
    grid = grid_of(image_size, patch_size)
    if len(ids) == 1 and grid != (1, 1):
        ids = ids.expand(grid[0] * grid[1], -1)
    else:
        ids = ids[prefix_tokens(len(ids), grid, num_prefix_tokens) :]
    ids = ids.cpu()
    chosen: Sequence[list[int]] = [(ids == expert).any(-1).nonzero()[:, 0].tolist() for expert in range(columns)]
    return np.stack([make_expert_mask(patches, image_size, patch_size) for patches in chosen])
