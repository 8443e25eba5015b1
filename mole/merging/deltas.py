"""What experts add at one module, as factors: ΔW_e = s_e B_e A_e, the scale always included.

LoRA at linear modules, embeddings and convolutions without groups has such factors. DoRA has them with the backbone's
weight at hand: ΔW_e = ν_e ∘ (W + s_e B_e A_e) − W, with ν_e = m_e / ‖W + s_e B_e A_e‖ (row by row), is a whole matrix.
IA3's factors less 1, and biases, are matrices of one column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole.adapters import Adapter, LoraWeights
from mole.backbones.modules import dense_weight
from mole.merging.products import LowRank

PRECISION = torch.float64


@dataclass(frozen=True)
class Delta:
    """One expert's factors as they are, B [d_out, r] and A [r, d_in] in float64, and its scale s."""

    B: Tensor
    A: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def folded(self) -> LowRank:
        """The same with the scale in B."""
        return LowRank(self.scale * self.B, self.A)


@dataclass(frozen=True)
class Form:
    """How factors lie in an adapter's tensors: the kind of module, A's axes behind the rank, B's behind it (of 1)."""

    kind: str
    inner: tuple[int, ...]
    trailing: int

    def weights(self, product: LowRank, bias: Tensor | None, dtype: torch.dtype) -> LoraWeights:
        """LoRA weights of scale 1 with the factors of `product`, on the CPU."""
        rank = product.rank
        A = product.A.reshape(rank, *self.inner).to("cpu", dtype).contiguous()
        B = product.B.reshape(product.B.shape[0], rank, *(1,) * self.trailing).to("cpu", dtype).contiguous()
        kept = None if bias is None else bias.to("cpu", dtype).contiguous()
        return LoraWeights(A=A, B=B, alpha=float(rank), bias=kept, embedding=self.kind == "embedding")


@dataclass(frozen=True)
class Layer:
    """What the experts add at the module `path`: by name, for those that adapt it.

    `names` are all experts of the merge. `deltas` are in alphabetical order, so that no result depends on the order in
    which experts were given. `part` is "" for a matrix; "bias" for what is added to the output whatever the input
    (lora_bias) and "factors" for what the output is multiplied by (IA3, less 1): a matrix of one column.
    """

    path: str
    names: tuple[str, ...]
    deltas: Mapping[str, Delta]
    form: Form
    part: str = ""

    @property
    def key(self) -> str:
        """What tells it from all other layers."""
        return f"{self.path}.{self.part}" if self.part else self.path

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        first = next(iter(self.deltas.values()))
        return first.B.shape[0], first.A.shape[1]

    @property
    def ranks(self) -> list[int]:
        """The ranks of the experts that adapt it."""
        return [delta.rank for delta in self.deltas.values()]

    def folded(self) -> dict[str, LowRank]:
        """Every expert's factors with the scale in B."""
        return {name: delta.folded() for name, delta in self.deltas.items()}


def paths_of(experts: Mapping[str, Adapter]) -> list[str]:
    """Every module that an expert adapts, each once; numbered blocks by number, whatever the order of experts."""
    found = [path for name in sorted(experts) for path in experts[name].modules]
    return sorted(dict.fromkeys(found), key=_natural)


def layers_of(
    experts: Mapping[str, Adapter], backbone: nn.Module | None = None, device: str | torch.device = "cpu"
) -> Iterator[Layer]:
    """One layer after the other, in float64 on `device`.

    Raises ValueError, naming expert and module, for weights without factors, for shapes that do not fit each other,
    and for DoRA where no backbone is given.
    """
    names = tuple(experts)
    for path in paths_of(experts):
        here = {name: experts[name].modules[path] for name in sorted(experts) if path in experts[name].modules}
        forms, deltas = {}, {}
        for name, weights in here.items():
            try:
                _check_finite(weights)
                forms[name], deltas[name] = _form(weights), _delta(weights, path, backbone, device)
            except ValueError as error:
                raise ValueError(f"expert {name!r} at {path}: {error}") from error
        _check_alike(path, forms, deltas)
        form = next(iter(forms.values()))
        yield Layer(path, names, deltas, form, "factors" if form.kind == "ia3" else "")
        added = {n: w.scale * w.bias for n, w in here.items() if getattr(w, "bias", None) is not None}
        if added:
            yield Layer(path, names, {n: column(bias, device) for n, bias in added.items()}, form, "bias")


def column(vector: Tensor, device: str | torch.device) -> Delta:
    """A vector as a matrix of one column, of rank 1."""
    values = vector.detach().flatten().to(device, PRECISION)
    return Delta(values[:, None], values.new_ones(1, 1), 1.0)


def _check_finite(weights: Any) -> None:
    if odd := [name for name, tensor in weights.tensors().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(odd)} holds numbers that are not finite: the expert's training went wrong")


def _form(weights: Any) -> Form:
    if not isinstance(weights, LoraWeights):
        return Form("ia3", (), 0)
    if weights.kind == "convolution" and weights.B.shape[1] != weights.rank:
        raise ValueError("a convolution with groups is no single product, so it cannot be merged")
    return Form(weights.kind, tuple(weights.A.shape[1:]), weights.B.dim() - 2)


def _delta(weights: Any, path: str, backbone: nn.Module | None, device: str | torch.device) -> Delta:
    if not isinstance(weights, LoraWeights):
        return column(weights.factors.detach().to(PRECISION) - 1, device)
    A, B = (factor.detach().to(device, PRECISION).flatten(1) for factor in (weights.A, weights.B))
    if weights.magnitude is None:
        return Delta(B, A, weights.scale)
    if backbone is None:
        raise ValueError(
            "what DoRA adds depends on the backbone's weight: name the backbone (backbone=…), or merge LoRA experts"
        )
    if weights.kind != "linear":
        raise ValueError(f"DoRA at {'an embedding' if weights.embedding else 'a convolution'} is not merged")
    W = dense_weight(backbone.get_submodule(path)).to(device, PRECISION)
    moved = torch.addmm(W, B, A, alpha=weights.scale)
    magnitude = weights.magnitude.detach().flatten().to(device, PRECISION)
    whole = (magnitude / torch.linalg.vector_norm(moved, dim=1))[:, None] * moved - W
    d_out, d_in = whole.shape
    eye = torch.eye(min(d_out, d_in), dtype=PRECISION, device=device)
    return Delta(whole, eye, 1.0) if d_in <= d_out else Delta(eye, whole, 1.0)


def _check_alike(path: str, forms: Mapping[str, Form], deltas: Mapping[str, Delta]) -> None:
    told = {name: (form.kind, deltas[name].B.shape[0], form.inner) for name, form in forms.items()}
    first, *others = told
    for other in others:
        if told[other] != told[first]:
            raise ValueError(
                f"{path}: the experts {first!r} and {other!r} were made for unlike modules: "
                f"{_shown(told[first])} and {_shown(told[other])}; merge experts of one backbone"
            )


def _shown(facts: tuple[str, int, Sequence[int]]) -> str:
    kind, d_out, inner = facts
    return f"{kind} {'×'.join(map(str, inner)) or '?'} → {d_out}"


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sorts numbered blocks by number: layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
