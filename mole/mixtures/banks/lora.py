"""LoRA experts at one linear module, stacked once; single experts are views of the stack."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole.adapters import LoraWeights
from mole.kernels import (
    KERNELS,
    SPARSE,
    Kernel,
    LoraStack,
    check_kernel,
    check_ranks,
    columns_of,
    inner,
    loop,
    parameters,
    pick,
    spread_of,
)
from mole.mixtures.banks.bank import Bank
from mole.registry import unknown
from mole.routing import Routing

logger = logging.getLogger(__name__)
EXPERT_DROPOUT = ("auto", "off", "shared", "independent")
EXPERT_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoraBank(Bank):
    """LoRA experts at one module, each with its own rank, alpha and scale.

    `experts` mixture index → weights, for the experts that have weights here; the others add nothing here, and the
    weight that a routing gives them is lost. The stacked tensors are the parameters, frozen unless asked otherwise
    (parameters, not buffers: data-parallel training would broadcast buffers at every forward).

    `dtype` is that of the module's computation, which `expert_dtype` auto takes; another one holds and computes the
    experts in that dtype, and stays when the model moves to another. `dropout` gives the rate of each expert, by
    mixture index, with which it drops its input while it trains:
    `expert_dropout` off never, shared one mask for all experts of a rate (auto), independent a mask for each, by the
    loop. Frozen experts drop nothing. `kernel` computes the sum: one of `mole.kernels`, or auto: the fastest for each
    routing. Raises ValueError for an unknown setting.
    """

    kind = "lora"

    def __init__(
        self,
        experts: Mapping[int, LoraWeights],
        num_experts: int,
        *,
        dtype: torch.dtype,
        kernel: str = "auto",
        dropout: Mapping[int, float] | None = None,
        expert_dropout: str = "auto",
        expert_dtype: str = "auto",
    ):
        for name, value, known in (
            ("expert_dropout", expert_dropout, EXPERT_DROPOUT),
            ("expert_dtype", expert_dtype, tuple(EXPERT_DTYPES)),
        ):
            if value not in known:
                raise ValueError(unknown(name, value, known))
        super().__init__(experts, num_experts)
        members = [experts[e] for e in self.present]
        self.ranks = tuple(m.rank for m in members)
        self.alphas = tuple((m.alpha, m.rslora) for m in members)
        self.scales = tuple(m.scale for m in members)
        self.dropout = tuple((dropout or {}).get(e, 0.0) for e in self.present)
        self.expert_dropout = expert_dropout
        self.own_dtype = EXPERT_DTYPES[expert_dtype]
        dtype = self.own_dtype or dtype
        self.A = nn.Parameter(torch.cat([m.A.detach().to(dtype) for m in members], dim=0), requires_grad=False)
        # A view of [R, d_out], in which the columns of an expert lie together.
        columns = torch.cat([m.B.detach().to(dtype).t() for m in members], dim=0)
        self.B = nn.Parameter(columns.t(), requires_grad=False)
        self.kernel = check_kernel(kernel)
        self._logged: set[str] = set()
        self._make_tables(self.A.device)

    def _make_tables(self, device: torch.device) -> None:
        super()._make_tables(device)
        if hasattr(self, "A"):  # not while Bank is being built
            precision = torch.promote_types(self.A.dtype, torch.float32)
            self._scales = torch.tensor(self.scales, device=device, dtype=precision)
            self._columns = columns_of(self.ranks, device)
            self._spread = spread_of(self._columns, self._scales)

    def _stack(self) -> LoraStack:
        A = self.A
        if self._scales.device != A.device:  # moved by what sets parameters one by one
            self._make_tables(A.device)
        return LoraStack(A, self.B, self._scales, self.ranks, self._columns, self._spread)

    def check_parameters(self) -> None:
        """Raises ValueError for experts of unequal ranks."""
        check_ranks(self.ranks)

    def forward(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """base_out + Σ_e w_e s_e B_e A_e x, in the shape and dtype of `base_out`, which is not changed.

        `x` [B, T, d_in]; `base_out` as many vectors [d_out] in any leading shape. With combine=parameters:
        base_out + (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x.
        """
        return self._spent(base_out, x, routing, base_out)

    def delta(self, base_out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """What the experts add to `base_out`, in its shape and dtype."""
        return self._spent(base_out, x, routing, None).reshape(base_out.shape).to(base_out.dtype)

    def _spent(self, base_out: Tensor, x: Tensor, routing: Routing, start: Tensor | None) -> Tensor:
        """`start`, None for 0, plus the experts' share."""
        stack = self._stack()
        if self.own_dtype is not None:
            x = x.to(self.own_dtype)
        if self.training and self.A.requires_grad and self.expert_dropout != "off" and any(self.dropout):
            return self._with_dropout(start, x, stack, routing)
        return self._run(x, stack, routing, start)

    def _run(self, x: Tensor, stack: LoraStack, routing: Routing, start: Tensor | None) -> Tensor:
        if self.combine == "parameters":
            return parameters(x, stack, self.local_weights(routing), start)
        name = self.kernel
        if name == "auto":
            name = pick(x, stack, routing.weights, routing.expert_ids)
            # In this order: a trace that looks at what was logged is made anew when that changes.
            if not torch.compiler.is_compiling() and name not in self._logged:
                self._logged.add(name)
                logger.debug("kernel %s: %d experts, %d in all of rank, of a routing %s", name, *_facts(stack, routing))
        kernel: Kernel = KERNELS[name]
        if name in SPARSE and routing.expert_ids is not None and routing.weights.dim() == 3:
            weights, ids = self.local_choice(routing)
            return kernel(x, stack, weights, start, ids)
        return kernel(x, stack, self.local_weights(routing), start)

    def inner(self, base_out: Tensor, x: Tensor, direction: Tensor) -> Tensor:
        """⟨δ_e(x), direction⟩ of every expert, as (s_e A_e x) · (B_eᵀ direction): [B, T, E], 0 for absent ones."""
        stack = self._stack()
        if self.own_dtype is not None:
            x = x.to(self.own_dtype)
        found = inner(x, stack, direction)
        if len(self.present) == self.num_experts:
            return found
        empty = found.new_zeros(*found.shape[:-1], self.num_experts)
        return empty.index_copy(-1, self._present.to(found.device), found)

    def _with_dropout(self, start: Tensor | None, x: Tensor, stack: LoraStack, routing: Routing) -> Tensor:
        rates = sorted(set(self.dropout))
        if self.combine == "parameters":
            if len(rates) > 1 or self.expert_dropout == "independent":
                raise ValueError(
                    "combine=parameters makes one adapter of all experts, which has one mask of dropout: set "
                    "expert_dropout=off, or give all experts one rate and set expert_dropout=shared"
                )
            return self._run(F.dropout(x, rates[0]), stack, routing, start)
        weights = self.local_weights(routing)
        if self.expert_dropout == "independent":
            return loop(x, stack, weights, start, dropout=self.dropout)
        if len(rates) == 1:
            return self._run(F.dropout(x, rates[0]), stack, routing, start)
        for rate in rates:
            places = [place for place, p in enumerate(self.dropout) if p == rate]
            start = KERNELS["stacked"](F.dropout(x, rate), stack.part(places), weights[..., places], start)
        assert start is not None
        return start

    def weights(self, expert: int) -> LoraWeights | None:
        """The weights of the expert with that mixture index, as views of the bank; None if it has none here."""
        if expert not in self.present:
            return None
        place = self.present.index(expert)
        part = self._stack().slices()[place]
        alpha, rslora = self.alphas[place]
        return LoraWeights(A=self.A.detach()[part], B=self.B.detach()[:, part], alpha=alpha, rslora=rslora)


def _facts(stack: LoraStack, routing: Routing) -> tuple[int, int, tuple[int, ...]]:
    return stack.num_experts, sum(stack.ranks), tuple(routing.weights.shape)
