"""A vision model with mixtures of experts on real photographs: trained a little, then the ways that patches take.

Usage: python scripts/moe_vision.py <data folder> [output folder] [steps]
  <data folder> has vision/coffee.png and vision/chelsea.png; `steps` of training, default 200

A small transformer sees a photograph as patches of 25 pixels, of which most are hidden from it, and learns to paint
them. Its MLP and one of its attentions are mixtures of experts; what is left is a picture per block and photograph, the
loads of the experts, and the losses.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mole.figure import png
from mole.moe import (
    MoEBlock,
    aux_loss,
    display_abs_experts_load,
    display_experts_load,
    image_through_experts,
    record_routing,
)

PATCH, WIDTH, HIDDEN = 25, 64, 0.6  # pixels; features; share of patches that are hidden in training
BALANCE = 5.0  # times the blocks' own coefficients: two photographs are little to keep experts apart on
ROUTING: dict[str, Any] = {"k": 1, "noise": None, "aux_criterion": "load_balance"}
PHOTOS = ("coffee.png", "chelsea.png")


class Patches(nn.Module):
    """Photographs [B, 3, H, W] → patches [B, T, 3 · PATCH²], row by row."""

    def forward(self, images: Tensor) -> Tensor:
        rows = functional.unfold(images, PATCH, stride=PATCH)
        return rows.transpose(1, 2)


class MLPs(MoEBlock):
    """Four MLPs and the hole; each token has one."""

    def __init__(self, layer_id: str):
        def mlp() -> nn.Module:
            return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

        super().__init__(mlp, input_dim=WIDTH, num_experts=4, hole=True, layer_id=layer_id, **ROUTING)


class Attentions(MoEBlock):
    """Three attentions; each looks at the tokens that are its own."""

    def __init__(self, layer_id: str):
        experts = [nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(3)]
        super().__init__(experts, input_dim=WIDTH, contract="sequence", layer_id=layer_id, **ROUTING)

    def expert_forward(self, expert: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        padding = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask.bool(), torch.finfo(x.dtype).min)
        return expert(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Painter(nn.Module):
    """Patches → the same patches, of which it may see some only."""

    def __init__(self, tokens: int):
        super().__init__()
        self.patches = Patches()
        self.read = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.places = nn.Parameter(0.5 * torch.randn(1, tokens, WIDTH))
        self.unseen = nn.Parameter(torch.zeros(WIDTH))
        self.attention, self.mlp = Attentions("attention"), MLPs("mlp")
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])
        self.paint = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`hidden` bool [B, T]: patches that are not shown. → [B, T, 3 · PATCH²]."""
        x = self.read(self.patches(images))
        if hidden is not None:
            x = torch.where(hidden[..., None], self.unseen, x)
        x = x + self.places
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.paint(self.norms[2](x))


def photographs(folder: Path) -> np.ndarray:
    """The photographs, all of the first one's height and width, uint8 [B, H, W, 3]."""
    found, size = [], (0, 0)
    for name in PHOTOS:
        with Image.open(folder / name) as image:
            photo = image.convert("RGB")
            size = size if any(size) else (photo.width // PATCH * PATCH, photo.height // PATCH * PATCH)
            found.append(np.asarray(photo.resize(size)))
    return np.stack(found)


def train(model: Painter, images: Tensor, steps: int) -> list[float]:
    """Mean squared errors of the hidden patches, before each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    wanted, losses = model.patches(images), []
    for _ in range(steps):
        hidden = torch.rand(wanted.shape[:2]) < HIDDEN
        error = (model(images, hidden) - wanted).square().mean(-1)[hidden].mean()
        optimizer.zero_grad()
        (error + BALANCE * aux_loss(model)).backward()
        optimizer.step()
        losses.append(float(error.detach()))
    return losses


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("outputs/moe-vision")
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    photos = photographs(Path(sys.argv[1]) / "vision")
    images = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
    torch.manual_seed(0)
    model = Painter((photos.shape[1] // PATCH) * (photos.shape[2] // PATCH))
    losses = train(model, images, steps)
    out.mkdir(parents=True, exist_ok=True)
    for title, figure in image_through_experts(list(photos), model, PATCH).items():
        (out / f"{title}.png").write_bytes(png(figure))
    model.eval()
    with torch.no_grad(), record_routing(model, labels=list(PHOTOS)) as stats:
        model(images)
    for block in (model.attention, model.mlp):
        (out / f"{block.layer_id}-load.png").write_bytes(png(display_experts_load(block)))
        (out / f"{block.layer_id}-total.png").write_bytes(png(display_abs_experts_load(block)))
    by_photo = {name: {photo: loads.tolist() for photo, loads in s.by_class.items()} for name, s in stats.items()}
    facts = {"steps": steps, "losses": losses, "blocks": {n: s.row() for n, s in stats.items()}, "by_photo": by_photo}
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"error of hidden patches: {np.mean(losses[:10]):.4f} → {np.mean(losses[-10:]):.4f} in {steps} steps")
    print(stats.table())
    print(out)


if __name__ == "__main__":
    main()
