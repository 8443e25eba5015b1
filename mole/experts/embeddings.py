"""Where the experts of a library lie to each other, from their factors alone; computed once and kept in the library.

The inner products of their updates are stored, an artefact of all experts together: cosines, embeddings, clusters and
the map are a few steps from them. No gradient, no data and no backbone is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole.experts.damage import sound_cards
from mole.experts.errors import LibraryError
from mole.experts.similarity import cosines, gram, svd_embedding
from mole.registry import unknown

if TYPE_CHECKING:
    from mole.experts.library import ExpertLibrary

KIND, CODE = "gram", 1


def comparable(library: ExpertLibrary, names: Sequence[str] | None, least: int = 2) -> list[str]:
    """The experts that are meant, sorted by name; None: all adapters. Raises LibraryError for a name that is none."""
    known = [name for name, card in sound_cards(library, names or ()).items() if card.kind == "adapter"]
    for name in names or ():
        if name not in known:
            raise LibraryError(f"{library.url}: {unknown('expert', name, known)}")
    chosen = sorted(set(names)) if names else known
    if len(chosen) < least:
        raise LibraryError(f"{library.url}: {least} experts at least are compared, there is {len(chosen)}")
    return chosen


def stored_gram(library: ExpertLibrary, names: Sequence[str]) -> Tensor:
    """G [E, E] in float64 of these experts, in the order of `names`, from the library if it is there.

    Raises ValueError for experts without LoRA factors, or for unlike modules.
    """
    contents = {name: library.card(name).content for name in names}
    places = {content: place for place, content in enumerate(sorted(set(contents.values())))}
    first = {content: name for name, content in reversed(contents.items())}

    def compute() -> dict[str, Tensor]:
        return {"gram": gram({content: library.get_expert(first[content]).adapter for content in places})}

    found = library.artefact(list(names), KIND, {"of": "updates"}, compute, code=CODE)["gram"]
    order = torch.tensor([places[contents[name]] for name in names])
    return found[order][:, order]


def embedding(library: ExpertLibrary, names: Sequence[str], num_components: int = 64) -> Tensor:
    """One row of length 1 for each expert, [E, k]: the largest singular directions of their updates."""
    return svd_embedding(stored_gram(library, names), num_components)


def layout(G: Tensor) -> Tensor:
    """Places [E, 2] in the plane whose distances are nearest to those of the updates' directions.

    Classical scaling of the cosines; each axis is turned so that its largest entry is positive.
    """
    likeness = cosines(G)
    centred = likeness - likeness.mean(0, keepdim=True) - likeness.mean(1, keepdim=True) + likeness.mean()
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    order = values.argsort(descending=True)[:2]
    places = vectors[:, order] * values[order].clamp_min(0).sqrt()
    signs = places.gather(0, places.abs().argmax(0, keepdim=True)).sign()
    places = places * torch.where(signs == 0, torch.ones_like(signs), signs)
    return torch.cat([places, places.new_zeros(len(places), 2 - places.shape[1])], dim=1)
