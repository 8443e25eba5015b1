"""Texts as vectors of length 1: hashed character n-grams, which need nothing, or a model for sentences."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (3, 4, 5)  # of the n-grams, in characters


def ngrams(text: str, features: int) -> Counter[int]:
    """How often each bucket of `features` is hit by the character n-grams of the text's words, in lower case."""
    found: Counter[int] = Counter()
    for word in text.lower().split():
        padded = f" {word} "
        for size in SIZES:
            for start in range(max(1, len(padded) - size + 1)):
                found[zlib.crc32(padded[start : start + size].encode()) % features] += 1
    return found


def inverse_frequencies(texts: Sequence[str], features: int) -> Tensor:
    """ln((1 + N) / (1 + n_i)) + 1 for the bucket i that n_i of the N texts hit: [features]."""
    hit = Counter(bucket for text in texts for bucket in ngrams(text, features))
    counts = torch.zeros(features)
    for bucket, count in hit.items():
        counts[bucket] = count
    return torch.log((1 + len(texts)) / (1 + counts)) + 1


def tfidf(texts: Sequence[str], frequencies: Tensor) -> Tensor:
    """(1 + ln count) × inverse frequency, of length 1: [N, features]; 0 for a text without a word."""
    rows = torch.zeros(len(texts), len(frequencies))
    for row, text in enumerate(texts):
        for bucket, count in ngrams(text, len(frequencies)).items():
            rows[row, bucket] = 1 + math.log(count)
    return F.normalize(rows * frequencies.cpu(), dim=-1)


class SentenceEncoder:
    """A model of sentence-transformers by name, loaded when it is first used; copies load their own."""

    def __init__(self, name: str):
        self.name = name
        self._model: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """→ [N, D], on the CPU. Raises ValueError if the package is missing."""
        if self._model is None:
            try:
                from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
            except ImportError:
                raise ValueError(
                    "router.encoder=sentence needs the package sentence-transformers: "
                    "pip install 'mole-experts[sentence]', or use router.encoder=tfidf"
                ) from None
            self._model = SentenceTransformer(self.name)
        vectors = torch.as_tensor(self._model.encode(list(texts)), dtype=torch.float32).cpu()
        worded = torch.tensor([bool(text.strip()) for text in texts])
        return F.normalize(vectors, dim=-1) * worded[:, None]

    def __reduce__(self):
        return (SentenceEncoder, (self.name,))


class TextClassifier(nn.Module):
    """Embeddings [B, D] → scores of C classes, by one hidden layer of width h; what the one training loop trains."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, embeddings: Tensor) -> Any:
        """→ an object with `logits` [B, 2, C]: the scores, as of a sequence whose second token is the class."""
        scores = self.out(F.relu(self.into(embeddings)))
        return SimpleNamespace(logits=torch.stack([scores, torch.zeros_like(scores)], dim=1))

    def layers(self) -> dict[str, Tensor]:
        """The layers by the names that a predictor keeps them under."""
        into, out = self.into, self.out
        return {"into": into.weight, "into_bias": into.bias, "out": out.weight, "out_bias": out.bias}
