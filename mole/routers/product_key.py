"""Product-key router: the best of very many experts, found among the pairs of √E sub-keys.

    q = W x → H heads, each two halves of width d_k;   s¹ = q¹ K¹ᵀ, s² = q² K²ᵀ over n ≥ √E sub-keys each
    score of the expert at (i, j) = s¹_i + s²_j;   the k largest of each head;   w = mean over the heads

He 2024 (PEER), arXiv 2407.04153; Lample et al. 2019, arXiv 1907.05242.

Exact: the pair at the ranks (a, b) of the two sorted lists has (a+1)(b+1) − 1 pairs that are no smaller. With h
places of the grid empty, the k best experts are among the k + h best places, so only pairs with (a+1)(b+1) ≤ k + h
are looked at: about (k + h) ln(k + h) of the n².
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass
from mole.routers.base import Combining, Learning, MixtureShape, Placing, Router
from mole.routers.float32 import Linear, at_least_float32, without_autocast
from mole.routers.pooling import valid_of
from mole.routers.selection import largest
from mole.routers.top_k import check_top_k
from mole.routing import Frame, Routing
from mole.routing.routing import EMPTY

USUAL_TOP_K = 16
MOMENTUM, EPSILON = 0.1, 1e-5  # of the batch norm


@config_dataclass
class ProductKeyConfig(Placing, Combining, Learning):
    """Heads, keys, and what becomes of the scores of the experts found."""

    name: Literal["product_key"] = "product_key"
    num_heads: Annotated[int, Field(ge=1)] = 8
    key_dim: Annotated[int, Field(ge=1)] = 128
    num_keys: Annotated[int, Field(ge=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    activation: Literal["softmax", "relu", "sigmoid"] = "softmax"
    query_norm: Literal["layer", "batch", "none"] = "layer"
    temperature: Annotated[float, Field(gt=0)] = 1.0

    def __post_init__(self):
        problems = self.placing_problems()
        if self.top_k == 1 and self.activation == "softmax":
            problems.append(
                "router.top_k=1 with router.activation=softmax gives every chosen expert the same weight, which has "
                "no gradient: set router.activation=sigmoid or raise router.top_k"
            )
        if problems:
            raise ValueError("\n".join(problems))


class QueryNorm(nn.Module):
    """Batch norm over the valid tokens of a forward; in eval over what training saw."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, queries: Tensor, frame: Frame) -> Tensor:
        """`queries` [B, T, width] → the same shape."""
        mean, variance = self.mean, self.variance
        if self.training:
            mask = valid_of(frame, queries).to(queries.device)
            if mask.shape != queries.shape[:2]:
                mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
            share = (mask / mask.sum().clamp_min(1))[..., None].to(queries.dtype)
            mean = (queries * share).sum((0, 1))
            variance = ((queries - mean).square() * share).sum((0, 1))
            if (id(self), "seen") not in frame.notes:
                frame.notes[id(self), "seen"] = True
                self.mean.lerp_(mean.detach().to(self.mean.dtype), MOMENTUM)
                self.variance.lerp_(variance.detach().to(self.variance.dtype), MOMENTUM)
        scaled = (queries - mean) * (variance + EPSILON).rsqrt()
        return scaled * at_least_float32(self.weight) + at_least_float32(self.bias)


def candidates(places: int, n: int) -> Tensor:
    """int64 [P, 2]: ranks (a, b) in two lists of n in which the best `places` pairs stand."""
    ranks = torch.arange(min(places, n))
    return ((ranks[:, None] + 1) * (ranks + 1) <= places).nonzero()


@ROUTERS.register("product_key", ProductKeyConfig)
class ProductKeyRouter(Router):
    """Learned token routing over a grid of n × n places; `slots` tells each expert's, i·n + j.

    The weights of a token are the mean over its heads, K = H·k of them, whose ids may repeat. Raises ValueError if
    top_k exceeds the experts, or num_keys is too small for them.
    """

    scope = "layer"
    learned = True
    open_shapes = frozenset({"sub_keys"})
    config: ProductKeyConfig
    slots: Tensor
    pairs: Tensor

    def __init__(self, config: ProductKeyConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        check_top_k(config.top_k, shape.num_experts)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        least = math.isqrt(shape.num_experts - 1) + 1
        n = least if config.num_keys is None else config.num_keys
        if n < least:
            raise ValueError(
                f"router.num_keys={n} gives {n**2} experts a place, and there are {shape.num_experts}: set it to "
                f"{least} or more, or to null"
            )
        self.k = config.top_k or min(USUAL_TOP_K, shape.num_experts)
        heads, width = config.num_heads, config.key_dim
        self.query = Linear(self.input_dim, heads * 2 * width, bias=False)
        self.sub_keys = nn.Parameter(self._fresh_keys(n))
        if config.query_norm == "layer":
            self.norm = nn.LayerNorm(width)
        elif config.query_norm == "batch":
            self.norm = QueryNorm(heads * 2 * width)
        self.register_buffer("slots", torch.arange(shape.num_experts))
        self.register_buffer("pairs", torch.empty(0, 2, dtype=torch.int64), persistent=False)
        self._fit()

    @property
    def n(self) -> int:
        """Sub-keys of each half."""
        return self.sub_keys.shape[2]

    def _fresh_keys(self, n: int) -> Tensor:
        heads, width = self.config.num_heads, self.config.key_dim
        return torch.randn(2, heads, n, width) / math.sqrt(width)

    def _fit(self) -> None:
        """What is looked at depends on the size of the grid."""
        places = self.k + self.n**2 - self.shape.num_experts
        self.depth = min(places, self.n)
        self.pairs = candidates(places, self.n).to(self.sub_keys.device)

    def check_state(self) -> None:
        """Raises ValueError for a grid that is none, or does not have a place of its own for every expert."""
        wanted = (2, self.config.num_heads, self.n, self.config.key_dim)
        slots = self.slots.tolist()
        if tuple(self.sub_keys.shape) != wanted or len(set(slots)) != self.shape.num_experts:
            raise ValueError(f"sub_keys {tuple(self.sub_keys.shape)} and {len(set(slots))} slots are no product_key's")
        if min(slots) < 0 or max(slots) >= self.n**2:
            raise ValueError(f"slots outside the grid of {self.n} × {self.n} sub-keys")
        self._fit()

    def sub_scores(self, x: Tensor, frame: Frame) -> Tensor:
        """s¹ and s²: [B, T, d_in] → [2, B, T, H, n], divided by the temperature."""
        queries = self.query(x)
        if self.config.query_norm == "batch":
            queries = self.norm(queries, frame)
        queries = queries.unflatten(-1, (self.config.num_heads, 2, -1))
        if self.config.query_norm == "layer":
            weight, bias = (at_least_float32(p).to(queries.dtype) for p in (self.norm.weight, self.norm.bias))  # type: ignore[arg-type]
            queries = F.layer_norm(queries, queries.shape[-1:], weight, bias)
        keys = at_least_float32(self.sub_keys).to(queries.dtype)
        return torch.einsum("bthsd,shnd->sbthn", queries, keys) / self.config.temperature

    def found(self, sub_scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k best experts of every head, best first: scores and ids, both [B, T, H, k]."""
        order = largest(sub_scores, self.depth)
        best = sub_scores.gather(-1, order)
        first, second = self.pairs.unbind(-1)
        scores = best[0][..., first] + best[1][..., second]
        places = order[0][..., first] * self.n + order[1][..., second]
        owners = torch.full((self.n**2,), EMPTY, device=places.device)
        owners = owners.scatter(0, self.slots, torch.arange(len(self.slots), device=places.device))
        ids = owners[places]
        ids, by_id = ids.sort(dim=-1, stable=True)  # ties go to the lower id
        scores = scores.gather(-1, by_id).masked_fill(ids == EMPTY, float("-inf"))
        kept = largest(scores, self.k)
        return scores.gather(-1, kept), ids.gather(-1, kept)

    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """`x` [B, T, d_in] → weights [B, T, H·k] with expert ids."""
        assert x is not None
        with without_autocast(x):
            sub_scores = self.sub_scores(x, frame)
            scores, ids = self.found(sub_scores)
            scores = self._dropped(scores, ids)
            if self.config.activation == "softmax":
                weights = torch.softmax(scores, dim=-1)
            else:
                weights = torch.relu(scores) if self.config.activation == "relu" else torch.sigmoid(scores)
            weights = weights.flatten(-2) / self.config.num_heads
            logits = self.all_scores(sub_scores) if frame.recording else None
        return Routing(weights, ids.flatten(-2), logits=logits)

    def all_scores(self, sub_scores: Tensor) -> Tensor:
        """[B, T, E], whose softmax is the mean of the heads' over all experts, for losses and statistics.

        Its logsumexp is the mean of the heads' too.
        """
        scores = sub_scores[0][..., self.slots // self.n] + sub_scores[1][..., self.slots % self.n]
        sizes = scores.logsumexp(-1, keepdim=True)
        return (scores - sizes).logsumexp(-2) - math.log(self.config.num_heads) + sizes.mean(-2)

    def _dropped(self, scores: Tensor, ids: Tensor) -> Tensor:
        """`scores` with −inf for experts left out of an example; a head that would have none left keeps all."""
        if not self.training or self.config.expert_dropout == 0:
            return scores
        chance = torch.rand(scores.shape[0], self.shape.num_experts, device=scores.device)
        out = (chance < self.config.expert_dropout).gather(-1, ids.flatten(1)).view(ids.shape)
        return scores.masked_fill(out & ~out.all(-1, keepdim=True), float("-inf"))

    def carry(self, old: Any) -> None:
        """As for every router; experts that both have keep their place in the grid, new ones take free places.

        The grid stays as large as the places of those that stay need it to be.
        """
        here = {name: index for index, name in enumerate(self.shape.expert_names)}
        both = [(here[name], row) for row, name in enumerate(old.shape.expert_names) if name in here]
        places = [divmod(int(old.slots[row]), old.n) for _, row in both]
        kept = [list(range(old.n)) if old.n <= self.n else sorted({place[half] for place in places}) for half in (0, 1)]
        n = max(self.n, *map(len, kept))
        with torch.no_grad():
            mine, theirs = self.state_dict(), old.state_dict()
            for name in mine.keys() - {"sub_keys", "slots"}:
                mine[name].copy_(theirs[name])
            if n > self.n:
                self.sub_keys.data = self._fresh_keys(n).to(self.sub_keys)
            for half, sources in enumerate(kept):
                for to, source in enumerate(sources):
                    self.sub_keys[half, :, to] = old.sub_keys[half, :, source].to(self.sub_keys)
            taken = {
                expert: kept[0].index(i) * n + kept[1].index(j)
                for (expert, _), (i, j) in zip(both, places, strict=True)
            }
            free = iter(sorted(set(range(n**2)) - set(taken.values())))
            for expert in range(self.shape.num_experts):
                self.slots[expert] = taken[expert] if expert in taken else next(free)
        self._fit()
