"""Prototypes that were made from an expert and data, kept in the library beside it: made once for the same of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mole.data import Sample
from mole.experts import Card, ExpertLibrary, artefacts
from mole.experts.card import digest_of

CODE = 1


@dataclass(frozen=True)
class KeptPrototypes:
    """The library that experts are of, their cards by their names in the mixture, and the backbone's digest.

    An expert without a card here is made anew each time.
    """

    library: ExpertLibrary
    cards: Mapping[str, Card]
    backbone: str

    def get(
        self,
        kind: str,
        expert: str,
        samples: Sequence[Sample],
        config: Mapping[str, Any],
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Path of a routed module → the prototype [d] there: as stored, or as `compute` gives it, which is stored.

        `config` is all that it depends on beside the expert's content, the samples and the backbone.
        """
        if expert not in self.cards:
            return compute()
        data = digest_of([[list(sample.input_ids), list(sample.labels)] for sample in samples])
        content = (self.cards[expert].content,)
        making = artefacts.Making(kind, CODE, dict(config), content, self.backbone, data)

        def stored() -> dict[str, Tensor]:
            return {site: vector.detach().float().cpu().contiguous() for site, vector in compute().items()}

        return artefacts.get(self.library, making, stored)


def routed(model: Any) -> str:
    """The digest of the modules that the model's routers stand before, which prototypes are of."""
    return digest_of([[site, list(router.sites)] for site, router in model.routers().items()])
