"""`mole plot image-routing`: an image on its way through the mixtures of experts of a saved vision model."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mole import moe
from mole.figure import MissingExtra, picture
from mole.moe.opening import open_model
from mole.registry import config_dataclass
from mole.run_folder import write_atomically

Count = Annotated[int, Field(ge=1)]


@config_dataclass
class PlotImageRouting:
    """Which model, which image, and how the one takes the other."""

    model: str
    image: str
    patch_size: Count | None = None
    num_prefix_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    size: tuple[Count, Count] | None = None
    mean: float = 0.5
    std: Annotated[float, Field(gt=0)] = 0.5
    format: Literal["png", "svg", "pdf"] = "png"
    to: str | None = None


def run(config: PlotImageRouting) -> None:
    """Draws one picture per block, and prints the files that it wrote."""
    pixels = _read(Path(config.image))
    model = open_model(config.model)
    reads = getattr(model, "main_input_name", "pixel_values")
    if reads != "pixel_values":
        raise ValueError(f"model={config.model}: a {type(model).__name__} takes {reads}, not images")
    patch_size = config.patch_size or getattr(model.config, "patch_size", None)
    if not isinstance(patch_size, int):
        raise ValueError("patch_size: the model does not say how large its patches are: give patch_size in pixels")
    size = config.size or _size(model.config, pixels)
    figures = moe.image_through_experts(
        _resized(pixels, size),
        model,
        patch_size,
        num_prefix_tokens=config.num_prefix_tokens,
        preprocess=lambda image: (image - config.mean) / config.std,
    )
    target = Path(config.to) if config.to is not None else Path(config.model) / "plots"
    for index, figure in enumerate(figures.values()):
        path = target / f"image-routing-{index}.{config.format}"
        write_atomically(path, picture(figure, config.format))
        print(path)


def _size(model_config: object, pixels: np.ndarray) -> tuple[int, int]:
    """Height and width that the model takes; those of the image where it does not say."""
    said = getattr(model_config, "image_size", None)
    if isinstance(said, int):
        return said, said
    if isinstance(said, list | tuple) and len(said) == 2:
        return int(said[0]), int(said[1])
    return pixels.shape[0], pixels.shape[1]


def _read(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Raises ValueError for a file that is not there or no image, MissingExtra without Pillow."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("images need Pillow, which comes with pip install 'mole-experts[plot]'") from None
    if not path.is_file():
        raise ValueError(f"image={path}: there is no such file")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image={path}: not an image that can be read: {error}") from None


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))
