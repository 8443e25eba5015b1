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
            raise ValueError("; ".join(problems))


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
    config: ProductKeyConfig
    slots: Tensor
    pairs: Tensor

    def __init__(self, config: ProductKeyConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        check_top_k(config.top_k, shape.num_experts)
        assert self.input_dim is not None, "a router of scope layer is built with the width of its input"
        least = math.isqrt(shape.num_experts - 1) + 1
        self.n = least if config.num_keys is None else config.num_keys
        if self.n < least:
            raise ValueError(
                f"router.num_keys={self.n} gives {self.n**2} experts a place, and there are {shape.num_experts}: "
                f"set it to {least} or more, or to null"
            )
        self.k = config.top_k or min(USUAL_TOP_K, shape.num_experts)
        heads, width = config.num_heads, config.key_dim
        self.query = Linear(self.input_dim, heads * 2 * width, bias=False)
        self.sub_keys = nn.Parameter(torch.randn(2, heads, self.n, width) / math.sqrt(width))
        if config.query_norm == "layer":
            self.norm = nn.LayerNorm(width)
        elif config.query_norm == "batch":
            self.norm = QueryNorm(heads * 2 * width)
        self.register_buffer("slots", torch.arange(shape.num_experts))
        places = self.k + self.n**2 - shape.num_experts
        self.depth = min(places, self.n)
        self.register_buffer("pairs", candidates(places, self.n), persistent=False)

    def sub_scores(self, x: Tensor, frame: Frame) -> Tensor:
        """s¹ and s²: [B, T, d_in] → [2, B, T, H, n], divided by the temperature."""
        queries = self.query(x)
        if self.config.query_norm == "batch":
            queries = self.norm(queries, frame)
        queries = queries.unflatten(-1, (self.config.num_heads, 2, -1))
        if self.config.query_norm == "layer":
            affine = at_least_float32(self.norm.weight), at_least_float32(self.norm.bias)  # type: ignore[arg-type]
            queries = F.layer_norm(queries, queries.shape[-1:], *(p.to(queries.dtype) for p in affine))
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

    def carry(self, old: Router) -> None:
        """As for every router; experts that both have keep their place in the grid, new ones take free places.

        Raises ValueError if those places use more sub-keys than this router has.
        """
        assert isinstance(old, ProductKeyRouter)
        here = {name: index for index, name in enumerate(self.shape.expert_names)}
        both = [(here[name], row) for row, name in enumerate(old.shape.expert_names) if name in here]
        places = [divmod(int(old.slots[row]), old.n) for _, row in both]
        used = [self._kept_keys({place[half] for place in places}, old.n) for half in (0, 1)]
        with torch.no_grad():
            mine, theirs = self.state_dict(), old.state_dict()
            for name in mine.keys() - {"sub_keys", "slots"}:
                mine[name].copy_(theirs[name])
            for half, kept in enumerate(used):
                for to, source in enumerate(kept):
                    self.sub_keys[half, :, to] = old.sub_keys[half, :, source]
            taken = {
                mine: used[0].index(i) * self.n + used[1].index(j)
                for (mine, _), (i, j) in zip(both, places, strict=True)
            }
            free = iter(sorted(set(range(self.n**2)) - set(taken.values())))
            for expert in range(self.shape.num_experts):
                self.slots[expert] = taken[expert] if expert in taken else next(free)

    def _kept_keys(self, used: set[int], old: int) -> list[int]:
        """Which of the `old` sub-keys become this router's, in order: all where there is room, else those in use."""
        kept = list(range(old)) if old <= self.n else sorted(used)
        if len(kept) > self.n:
            raise ValueError(
                f"router=product_key: the experts that stay use {len(kept)} sub-keys, and {self.shape.num_experts} "
                f"experts alone would have {self.n}: set router.num_keys={old}"
            )
        return kept
