"""Task predictor: the experts whose own training texts are most like the prompt, found once per example.

With s_c how much the text is like class c (one class per task):
    log p_c = log softmax_c(s_c / temperature);   log p_e = log Σ_{c of e} p_c;   w = softmax of log p_e over the k best

centroid: s_c is the cosine with the mean embedding of the class; nearest: the largest cosine with a stored example
(retrieval: the baseline of PHATGOOSE, arXiv 2402.05859); knn: the log of the class's share of votes among the
nearest examples; classifier: the log-probability that a small network trained on the embeddings gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mole.registry import ROUTERS, config_dataclass, unknown
from mole.routers.base import Combining, MixtureShape, Router
from mole.routers.pooling import mean_of, prompt_of
from mole.routers.prototypes import ABSENT, best
from mole.routers.text_encoders import SentenceEncoder, inverse_frequencies, tfidf
from mole.routing import Frame, Routing

Count = Annotated[int, Field(ge=1)]


@config_dataclass
class PredictorConfig(Combining):
    """How texts become vectors (`encoder`), how vectors tell tasks (`head`), and what happens to a text that is like
    none: `fallback`, if no expert has a probability of `min_confidence`, and for a text without words.
    """

    name: Literal["predictor"] = "predictor"
    encoder: Literal["tfidf", "sentence", "backbone"] = "tfidf"
    head: Literal["centroid", "nearest", "knn", "classifier"] = "centroid"
    top_k: Count | None = 1
    norm_topk: bool = True
    temperature: Annotated[float, Field(gt=0)] = 0.1
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    fallback: Literal["uniform", "backbone", "default"] = "uniform"
    default_expert: str | None = None
    features: Annotated[int, Field(ge=16)] = 2048
    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    examples_per_expert: Count = 100
    neighbours: Count = 8
    hidden: Count = 128
    classifier_steps: Count = 200
    classifier_lr: Annotated[float, Field(gt=0)] = 3e-3
    seed: int = 0

    def __post_init__(self):
        if (self.fallback == "default") != (self.default_expert is not None):
            raise ValueError("router.fallback=default and router.default_expert go together: give both or neither")


@ROUTERS.register("predictor", PredictorConfig)
class PredictorRouter(Router):
    """Weights [B, 1, K] by the text of the prompt, made once per example and kept while generating.

    `tasks` are the C classes. State: `frequencies` of n-grams; `examples` [M, D] of length 1 and their `labels` [M]
    (one mean per class for the head centroid); the layers of the classifier. Raises ValueError if no expert has a task.
    """

    needs = frozenset({"texts", "prototypes"})
    keeps = True
    open_shapes = frozenset({"frequencies", "examples", "labels", "into", "into_bias", "out", "out_bias"})
    members: Tensor
    frequencies: Tensor
    examples: Tensor
    labels: Tensor
    into: Tensor
    into_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, config: PredictorConfig, shape: MixtureShape, **place: Any):
        super().__init__(config, shape, **place)
        self.tasks = tuple(dict.fromkeys(task for tasks in shape.expert_tasks for task in tasks))
        if not self.tasks:
            raise ValueError("router=predictor: no expert of this mixture lists a task in its card; add tasks to them")
        if config.default_expert is not None and config.default_expert not in shape.expert_names:
            raise ValueError(f"router.default_expert: {unknown('expert', config.default_expert, shape.expert_names)}")
        if config.encoder == "backbone":
            self.needs = frozenset({"embeddings", "prototypes"})  # type: ignore[misc]
        members = torch.tensor([[task in tasks for task in self.tasks] for tasks in shape.expert_tasks])
        self.register_buffer("members", members, persistent=False)
        for name in sorted(self.open_shapes - {"labels"}):
            self.register_buffer(
                name, torch.zeros((0,) if name in ("frequencies", "into_bias", "out_bias") else (0, 0))
            )
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))
        self._sentences = SentenceEncoder(config.sentence_model)

    # ---- before it is used
    def missing(self) -> tuple[str, ...]:
        """The tasks that nothing is known of yet; all of them for a classifier that knows other tasks."""
        if self.config.head == "classifier" and len(self.out) != len(self.tasks):
            return self.tasks
        known = set(self.labels.tolist())
        return tuple(task for index, task in enumerate(self.tasks) if index not in known)

    def learn_frequencies(self, texts: list[str]) -> None:
        """The n-grams of all texts, unless they are known from before; encoder tfidf only."""
        if self.config.encoder == "tfidf" and not len(self.frequencies):
            found = inverse_frequencies(texts, self.config.features)
            self.frequencies = found.to(self.frequencies.device)

    def embedded(self, texts: list[str]) -> Tensor:
        """→ [N, D] of length 1, 0 for a text without words. Not for the encoder `backbone`, which reads ids."""
        if self.config.encoder == "sentence":
            return self._sentences(texts).to(self.examples.device)
        return tfidf(texts, self.frequencies).to(self.examples.device)

    def take_examples(self, found: Mapping[str, Tensor]) -> None:
        """Task → embeddings [n, D] of its texts: what the head compares with. Other tasks stay as they are."""
        taken = {self.tasks.index(task) for task in found}
        stay = [place for place, label in enumerate(self.labels.tolist()) if label not in taken]
        rows, labels = [self.examples[stay]] if stay else [], self.labels[stay].tolist()
        for task, vectors in found.items():
            if self.config.head in ("centroid", "classifier"):
                vectors = F.normalize(vectors.mean(0, keepdim=True), dim=-1)
            rows.append(vectors.to(self.examples))
            labels += [self.tasks.index(task)] * len(vectors)
        self.examples = torch.cat(rows)
        self.labels = torch.tensor(labels, device=self.labels.device)

    def take_classifier(self, layers: Mapping[str, Tensor]) -> None:
        """`into` [h, D], `into_bias` [h], `out` [C, h], `out_bias` [C] of a network trained on the embeddings."""
        for name in ("into", "into_bias", "out", "out_bias"):
            setattr(self, name, layers[name].detach().to(self.examples))

    def check_state(self) -> None:
        """Raises ValueError for texts of other tasks, or tensors that do not fit each other."""
        classes, known = len(self.tasks), len(self.labels)
        fits = known == len(self.examples)
        fits = fits and (not known or 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes)
        if self.config.encoder == "tfidf" and known:
            fits = fits and self.frequencies.shape[0] == self.examples.shape[1] == self.config.features
        if len(self.out):
            fits = fits and self.into.shape == (len(self.into_bias), self.examples.shape[1])
            fits = fits and self.out.shape == (classes, len(self.into_bias)) and len(self.out_bias) == classes
        if not fits:
            raise ValueError("what the predictor knows does not fit the tasks of these experts")

    def carry(self, old: Any) -> None:
        """What is known of the tasks that both have; a classifier only if they are the same."""
        self.frequencies = old.frequencies.clone()
        here = [self.tasks.index(task) if task in self.tasks else -1 for task in old.tasks]
        labels = [here[label] for label in old.labels.tolist()]
        stay = [place for place, label in enumerate(labels) if label >= 0]
        if stay:
            self.examples = old.examples[stay].clone()
        self.labels = torch.tensor([labels[place] for place in stay], dtype=torch.long, device=old.labels.device)
        if self.tasks == old.tasks:
            self.take_classifier(
                {name: getattr(old, name).clone() for name in ("into", "into_bias", "out", "out_bias")}
            )

    # ---- in use
    def forward(self, x: Tensor | None, frame: Frame) -> Routing:
        """→ weights per example, [B, 1, K] with ids, or dense [B, 1, E] if some text falls back."""
        if self.missing() == self.tasks:
            raise ValueError(
                "router=predictor knows no texts of its experts yet: mole build-moe router=predictor dataset=[…]"
            )
        vectors = self._read(frame)
        with torch.autocast(vectors.device.type, enabled=False):
            logits = self.expert_scores(vectors)
        routing = best(logits[:, None], self.config.top_k, normalise=self.config.norm_topk)
        unsure = (vectors == 0).all(-1) | (torch.softmax(logits, -1).amax(-1) < self.config.min_confidence)
        if not bool(unsure.any()):
            return routing
        dense = routing.dense(self.shape.num_experts)
        return Routing(torch.where(unsure[:, None, None], self._fallback(dense), dense), logits=routing.logits)

    def expert_scores(self, vectors: Tensor) -> Tensor:
        """Embeddings [B, D] → log p_e [B, E]; `ABSENT` for experts of no known task."""
        likeness = self._likeness(vectors) / self.config.temperature
        log_p = torch.log_softmax(likeness, dim=-1)[:, None]
        found = log_p.masked_fill(~self.members, ABSENT).logsumexp(-1)
        return found.clamp_min(ABSENT)

    def _read(self, frame: Frame) -> Tensor:
        """The embedding [B, D] of each prompt, of length 1."""
        if self.config.encoder != "backbone":
            return self.embedded(list(frame.need("texts", "predictor")))
        embeddings = frame.need("embeddings", "predictor").detach()
        return mean_direction(embeddings, prompt_of(frame, "predictor")).to(self.examples)

    def _likeness(self, vectors: Tensor) -> Tensor:
        """Embeddings [B, D] → s [B, C]; `ABSENT` for tasks that nothing is known of."""
        if self.config.head == "classifier":
            hidden = F.relu(F.linear(vectors, self.into, self.into_bias))
            return torch.log_softmax(F.linear(hidden, self.out, self.out_bias), dim=-1)
        cosines = vectors @ self.examples.T
        empty = cosines.new_full((len(vectors), len(self.tasks)), ABSENT * self.config.temperature)
        if self.config.head != "knn":
            return empty.scatter_reduce(1, self.labels.expand_as(cosines), cosines, "amax")
        near = cosines.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.neighbours]
        votes = torch.zeros_like(empty).scatter_add(1, self.labels[near], torch.ones_like(near, dtype=empty.dtype))
        return torch.where(votes > 0, (votes / near.shape[1]).log(), empty)

    def _fallback(self, like: Tensor) -> Tensor:
        """What a text gets that is like none, [E]."""
        experts = self.shape.num_experts
        if self.config.fallback == "uniform":
            return like.new_full((experts,), 1.0 / experts)
        row = like.new_zeros(experts)
        if self.config.fallback == "default":
            row[self.shape.expert_names.index(self.config.default_expert)] = 1.0
        return row


def mean_direction(embeddings: Tensor, counted: Tensor) -> Tensor:
    """Mean over the tokens `counted` [B, T] of their embeddings [B, T, H], of length 1: [B, H]."""
    return F.normalize(mean_of(embeddings, counted.to(embeddings.device))[:, 0], dim=-1)
