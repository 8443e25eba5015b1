"""The backbone inside the package: a Llama of about a million parameters that runs everywhere, with no download.

`tiny/README.md` says how it was made.
"""

from pathlib import Path
from typing import Literal

from mole.backbones.heads import HeadKind, Pooling
from mole.backbones.load import Attention, Backbone, Dtype, load_pretrained
from mole.head import Head
from mole.registry import BACKBONES, config_dataclass

FOLDER = Path(__file__).parent / "tiny"


@config_dataclass
class TinyConfig:
    """The embedded backbone."""

    name: Literal["tiny"] = "tiny"
    dtype: Dtype = "float32"
    device: str = "auto"
    attention: Attention = "auto"
    head: HeadKind = "native"
    pooling: Pooling = "auto"


@BACKBONES.register("tiny", TinyConfig)
def load_tiny(config: TinyConfig, *, head: Head | None = None, seed: int = 0) -> Backbone:
    """The embedded backbone; its label on cards is `mole/tiny`."""
    return load_pretrained(str(FOLDER), config, label="mole/tiny", head=head, seed=seed)
