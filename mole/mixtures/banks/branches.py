"""Experts at a post-norm sub-layer and at norms, as branches beside the plain backbone: y = Σ_k w_k b_k + w_0 b_0.

Of an output module with h and x, b_k = LN_k(h + u_k(·) + x) and b_0 = LN_0(h + x): an expert that has no bottleneck
here takes part with u = 0, one that trained no norm with the backbone's. Of a norm, b_k = N_k(z). Each norm runs over
its own branch. w_0 is what the routing gives the backbone, else what its weights leave of 1.

One branch after another: on a CPU no stacked form was faster, and a branch is bit for bit what its expert alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.adapters import BottleneckWeights, NormWeights
from mole.adapters.bottleneck import added, seen_at
from mole.adapters.norm import normed
from mole.mixtures.banks.bank import Bank
from mole.routing import Routing


class Ending(NamedTuple):
    """The end of a post-norm sub-layer: h and x [B, T, d], h + x, LN_0, and b_0 = LN_0(h + x)."""

    h: Tensor
    x: Tensor
    total: Tensor
    norm: Any
    out: Tensor


class Member(nn.Module):
    """One expert's tensors at a site: of a bottleneck, of a norm, or of both; frozen unless asked otherwise."""

    down: Any  # these, up to norm_bias, are parameters or None
    down_bias: Any
    up: Any
    up_bias: Any
    gain: Any
    norm_weight: Any
    norm_bias: Any

    def __init__(self, small: BottleneckWeights | None, norm: NormWeights | None, dtype: torch.dtype, dropout: float):
        super().__init__()
        self.has_bottleneck, self.has_norm = small is not None, norm is not None
        self.dropout = nn.Dropout(dropout)
        for name in ("down", "down_bias", "up", "up_bias", "gain"):
            self._hold(name, None if small is None else getattr(small, name), dtype)
        self._hold("norm_weight", None if norm is None else norm.weight, dtype)
        self._hold("norm_bias", None if norm is None else norm.bias, dtype)
        if small is not None:
            self.activation, self.scale, self.reads = small.activation, small.scale, small.reads

    def _hold(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        held = None if tensor is None else nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)
        self.register_parameter(name, held)

    def normed(self, norm: Any, z: Tensor) -> Tensor:
        """LN_k(z), or LN_0(z) of an expert that trained none."""
        return normed(norm, z, self.norm_weight, self.norm_bias) if self.has_norm else norm(z)

    def update(self, end: Ending) -> Tensor | None:
        """u_k [B, T, d]; None of an expert without a bottleneck here."""
        if not self.has_bottleneck:
            return None
        drop = self.dropout if self.training and self.down.requires_grad else None
        seen = seen_at(self.reads, end.h, end.x, end.total, lambda total: self.normed(end.norm, total))
        return added(self, seen, drop)

    def branch(self, end: Ending) -> Tensor:
        """b_k [B, T, d]."""
        update = self.update(end)
        return self.normed(end.norm, end.total if update is None else end.total + update)

    def small(self) -> BottleneckWeights | None:
        """The bottleneck as weights, views of these."""
        if not self.has_bottleneck:
            return None
        return BottleneckWeights(
            down=self.down.detach(),
            down_bias=self.down_bias.detach(),
            up=self.up.detach(),
            up_bias=self.up_bias.detach(),
            gain=None if self.gain is None else self.gain.detach(),
            activation=self.activation,
            scale=self.scale,
            reads=self.reads,
        )

    def own_norm(self) -> NormWeights | None:
        """The norm as weights, views of these."""
        if not self.has_norm:
            return None
        return NormWeights(self.norm_weight.detach(), None if self.norm_bias is None else self.norm_bias.detach())


class Branches(Bank):
    """What both banks of branches share: the members, and the sum over them."""

    kind = "bottleneck"
    mixes_base = True

    def __init__(self, members: Mapping[int, Member], num_experts: int):
        super().__init__(members, num_experts)
        self.members = nn.ModuleList([members[e] for e in self.present])

    def check_parameters(self) -> None:
        """Raises ValueError: norms are not linear in what they read."""
        raise ValueError(
            "combine=parameters: experts at norms, and at sub-layers that a norm closes, are mixed as branches: use "
            "combine=outputs"
        )

    def each(self) -> Iterator[tuple[int, Any]]:
        """Place, member."""
        return enumerate(self.members)

    def summed(self, routing: Routing, base: Tensor, branch: Callable[[Any], Tensor]) -> Tensor:
        """Σ_k w_k b_k + w_0 b_0 over the experts of this bank; those that are absent are the backbone here."""
        weights = self.local_weights(routing)
        if routing.base is None:
            left = 1.0 - weights.sum(-1, keepdim=True)
        else:
            left = routing.dense(self.num_experts).sum(-1, keepdim=True) - weights.sum(-1, keepdim=True) + routing.base
        out = left.to(base.dtype) * base
        for place, member in self.each():
            out = out + weights[..., place, None].to(base.dtype) * branch(member)
        return out

    def member(self, expert: int) -> Any:
        """What the expert with that mixture index has here; None if it has nothing."""
        return self.members[self.present.index(expert)] if expert in self.present else None

    def norm_of(self, expert: int) -> NormWeights | None:
        """The norm of that expert here."""
        found = self.member(expert)
        return None if found is None else found.own_norm()


class OutputBank(Branches):
    """Branches at the output module of a post-norm block."""

    @property
    def has_norms(self) -> bool:
        """Whether an expert has a norm of its own here."""
        return any(member.has_norm for member in self.members)

    def mixed(self, end: Ending, routing: Routing) -> Tensor:
        """y [B, T, d]."""
        return self.summed(routing, end.out, lambda member: member.branch(end))

    def share(self, end: Ending, routing: Routing) -> Tensor:
        """Σ_k w_k u_k [B, T, d], without norms and residual: what an attention over experts mixes."""
        weights, out = self.local_weights(routing), torch.zeros_like(end.h)
        for place, member in self.each():
            update = member.update(end)
            if update is not None:
                out = out + weights[..., place, None].to(out.dtype) * update
        return out

    def toward(self, end: Ending, direction: Tensor) -> Tensor:
        """⟨u_k, direction⟩ of every expert of the mixture: `direction` [B, T, d] → [B, T, E], 0 for absent ones."""
        found = [direction.new_zeros(direction.shape[:-1])] * self.num_experts
        for place, member in self.each():
            update = member.update(end)
            if update is not None:
                found[self.present[place]] = (update * direction).sum(-1)
        return torch.stack(found, dim=-1)

    def asked(self, end: Ending) -> Tensor:
        """What asks in an attention over these experts [B, T, d]: h, x, or b_0, by what their bottlenecks read."""
        reads = {member.reads for _, member in self.each() if member.has_bottleneck}
        return {"h": end.h, "x": end.x}.get(next(iter(reads)), end.out) if len(reads) == 1 else end.out

    def weights(self, expert: int) -> BottleneckWeights | None:  # type: ignore[override]
        """The bottleneck of the expert with that mixture index, as views of the bank; None if it has none here."""
        found = self.member(expert)
        return None if found is None else found.small()


class NormBank(Branches):
    """Norms of experts at a norm that closes no site."""

    kind = "norm"

    def __init__(self, norms: Mapping[int, NormWeights], num_experts: int, *, base: nn.Module, dtype: torch.dtype):
        super().__init__({e: Member(None, norms[e], dtype, 0.0) for e in norms}, num_experts)
        self._norm = (base,)  # in a tuple: the backbone owns the module

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`x` [B, T, d] is what the norm reads, `base_out` what the backbone's gives, in any leading shape → y."""
        base = base_out.reshape(x.shape)
        return self.summed(routing, base, lambda member: member.normed(self._norm[0], x)).reshape(base_out.shape)

    def weights(self, expert: int) -> NormWeights | None:  # type: ignore[override]
        """The norm of the expert with that mixture index, as views of the bank; None if it has none here."""
        return self.norm_of(expert)
