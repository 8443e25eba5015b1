"""Hash router: which expert works is a fixed random function of the token, the task, or the whole prompt.

Hash Layers: Roller et al. 2021, arXiv 2106.04426. Every expert draws a hash of (key, its name, seed) and the largest
wins (rendezvous hashing: Thaler and Ravishankar 1998), so that a new expert takes its share from all others and moves
nothing between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, MixtureShape, Router
from mole.routers.hashing import hash_of_text, hash_of_tokens, mixed, non_negative, signed
from mole.routers.pooling import prompt_of
from mole.routers.selection import largest
from mole.routing import Frame, Routing

NOBODY = -1


@config_dataclass
class HashConfig(Combining):
    """One expert (or `num_hashes` of them, with equal weights) for each token, task or prompt.

    `balanced` gives the tokens of a dataset to the experts by their counts, the commonest first, each to the expert
    with the least so far; other tokens go by the hash.
    """

    name: Literal["hash"] = "hash"
    by: Literal["token", "task", "example"] = "token"
    seed: int = 0
    balanced: bool = False
    num_hashes: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self):
        if self.balanced and (self.by != "token" or self.num_hashes != 1):
            raise ValueError("router.balanced=true gives tokens to one expert each: set by=token and num_hashes=1")


@ROUTERS.register("hash", HashConfig)
class HashRouter(Router):
    """Weights [B, T, K], or [B, 1, K] by task or example. Raises ValueError if num_hashes exceeds the experts.

    `table` int64 [V]: the expert of each token of a vocabulary, -1 where the hash decides; empty unless `balanced`.
    """

    needs = frozenset({"input_ids"})
    open_shapes = frozenset({"table"})
    table: Tensor
    salts: Tensor

    def __init__(self, config: HashConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        if config.num_hashes > shape.num_experts:
            raise ValueError(
                f"router.num_hashes={config.num_hashes} with {shape.num_experts} experts: lower router.num_hashes"
            )
        if config.by != "token":
            self.needs = frozenset({"task_names"} if config.by == "task" else {"input_ids"})  # type: ignore[misc]
        self.keeps = config.by == "example"  # type: ignore[misc]
        salts = [signed(hash_of_text(name, config.seed)) for name in shape.expert_names]
        self.register_buffer("salts", torch.tensor(salts), persistent=False)
        self.register_buffer("table", torch.zeros(0, dtype=torch.long))

    def take_counts(self, counts: Mapping[int, int], vocabulary: int) -> None:
        """How often each token id occurs in a dataset → `table`, for a vocabulary of that size."""
        table, load = torch.full((vocabulary,), NOBODY), [0] * self.shape.num_experts
        for token in sorted(counts, key=lambda token: (-counts[token], token)):
            least = min(range(len(load)), key=lambda expert: (load[expert], expert))
            table[token] = least
            load[least] += counts[token]
        self.table = table.to(self.table.device)

    def check_state(self) -> None:
        """Raises ValueError for a table of other experts."""
        if len(self.table) and not NOBODY <= int(self.table.min()) <= int(self.table.max()) < self.shape.num_experts:
            raise ValueError("the table of tokens names experts that the mixture does not have")

    def carry(self, old: Any) -> None:
        """The table, for the experts that are still there; tokens of others go by the hash."""
        names = self.shape.expert_names
        here = [names.index(name) if name in names else NOBODY for name in old.shape.expert_names]
        moved = torch.tensor([*here, NOBODY], device=old.table.device)  # index -1 is the last: nobody stays nobody
        self.table = moved[old.table].to(self.table.device)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """→ weights 1 / num_hashes with expert ids, [B, T, K] or [B, 1, K]."""
        keys = self._keys(frame)
        if self.config.balanced and not len(self.table):
            raise ValueError(
                "router.balanced=true needs token counts first: mole build-moe router=hash router.balanced=true "
                "dataset=[…]"
            )
        scores = non_negative(mixed(keys[..., None] ^ self.salts))
        ids = largest(scores, self.config.num_hashes)
        if len(self.table):
            tokens = keys.clamp_max(len(self.table) - 1)
            listed = torch.where(keys < len(self.table), self.table[tokens], NOBODY)[..., None]
            ids = torch.where(listed == NOBODY, ids, listed)
        weight = torch.full(ids.shape, 1.0 / self.config.num_hashes, device=ids.device)
        return Routing(weight, ids)

    def _keys(self, frame: Frame) -> Tensor:
        """What is hashed, int64 [B, T] or [B, 1]."""
        device = self.salts.device
        if self.config.by == "task":
            tasks = frame.need("task_names", "hash")
            return torch.tensor([[signed(hash_of_text(task, self.config.seed))] for task in tasks], device=device)
        ids = frame.need("input_ids", "hash").to(device)
        if self.config.by == "token":
            return ids
        prompt = prompt_of(frame, "hash").to(device)
        return hash_of_tokens(ids, prompt, self.config.seed)[:, None]
