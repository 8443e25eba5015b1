"""MoEBlock: a sparse mixture of experts out of any modules.

    y = Σ over a token's slots of gate · expert(x)

A router chooses (routers/), null experts and capacity change what is chosen, a back-end runs the chosen experts
(dispatch/), losses keep them balanced (balance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mole.moe.balance import block_losses, slot_counts, summed_over_ranks
from mole.moe.capacity import factor_of, limited
from mole.moe.config import MoEConfig, losses_of
from mole.moe.contracts import contract_of, takes_mask
from mole.moe.dispatch import ExpertPlan, Fitness, check_backend, dispatched, dispatched_whole, fitness
from mole.moe.experts import Experts
from mole.moe.inject import injected
from mole.moe.latest import Latest
from mole.moe.ledger import Ledger, nothing_owed
from mole.moe.nulls import Nulls, alike
from mole.moe.reading import Units, units_of
from mole.moe.recompute import recomputing
from mole.moe.routers import MOE_ROUTERS, Choice, SoftChoice, Tokens
from mole.moe.settling import constant_width, input_width, settled
from mole.routing import Routing, RoutingContext

Observer = Callable[["MoEBlock", Routing, Tensor], None]
NOT_GIVEN: Any = object()


class MoEBlock(nn.Module):
    """Experts, the router that chooses among them, and what they share.

    `experts`: a list, a module to copy, or a factory. Either `config`, or flat arguments with MoEfy's names:
    `k`, `expert_choice`, `hole`, `noise`, `aux_criterion`, `aggregation`, `route`, `layer_id`, `num_experts`,
    `contract`, `backend`, `init_noise`. `causal`: the block stands in a decoder; `allow_noncausal`: routers that look
    ahead are welcome there.

    `observers` are called with (block, routing without graph, bool mask [B, T]) after each forward that is not a
    recomputation; `context`, if set, tells the attention mask and token ids of the model's forward.
    """

    def __init__(
        self,
        experts: Experts,
        input_dim: int | None = None,
        num_experts: int | None = None,
        *,
        config: MoEConfig | None = None,
        causal: bool = False,
        allow_noncausal: bool = False,
        k: int = NOT_GIVEN,
        expert_choice: bool = NOT_GIVEN,
        hole: bool = NOT_GIVEN,
        noise: str | None = NOT_GIVEN,
        aux_criterion: str | None = NOT_GIVEN,
        aggregation: str = NOT_GIVEN,
        route: str = NOT_GIVEN,
        layer_id: int | str | None = NOT_GIVEN,
        contract: str = NOT_GIVEN,
        backend: str = NOT_GIVEN,
        init_noise: float = NOT_GIVEN,
    ):
        super().__init__()
        flat = {"k": k, "expert_choice": expert_choice, "hole": hole, "noise": noise, "aux_criterion": aux_criterion}
        flat |= {"aggregation": aggregation, "route": route, "layer_id": layer_id, "contract": contract}
        flat |= {"backend": backend, "init_noise": init_noise}
        given = {name: value for name, value in flat.items() if value is not NOT_GIVEN}
        place = {"causal": causal, "allow_noncausal": allow_noncausal}
        config, modules, count = settled(experts, num_experts, config, given, **place)
        self.config, self.layer_id, self.num_experts = config, config.layer_id, count
        self.experts = nn.ModuleList(modules[:count])
        self.shared = nn.ModuleList(modules[count:])
        self.input_dim = input_width(modules[:count], input_dim, config)
        self.router = MOE_ROUTERS[config.router.name].implementation(config, count, self.input_dim)
        width = constant_width(modules[0], self.expert_forward, config, self.input_dim)
        self.nulls = Nulls(config.null_experts, count, width)
        first = next(self.experts.parameters(), None)
        if first is not None:
            self.router.to(first.device)
            self.nulls.to(first.device)
        self.coefficients = losses_of(config, count)
        self.loss_share = 1.0
        self.context: RoutingContext | None = None
        self.observers: list[Observer] = []
        self.ledger = Ledger()
        self._takes_mask = takes_mask(self.expert_forward, config.contract)
        self._contract: str | None = None
        self._fitness: Fitness | None = None
        check_backend(config.backend, fitness(self._plan(), None))

    # ---- to override
    def expert_forward(self, expert: nn.Module, x: Tensor) -> Tensor:
        """One expert's work: [1, n, d], or whole samples, → the same leading shape. A third argument gets the mask."""
        return expert(x)

    # ---- forward
    def forward(self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """x [B, T, d] (or [N, d], [B, …, d]) → y [B, T, *out]; route=images: [B, C, …] → the experts' output.

        `padding_mask` [B, T], 1 at real tokens: the others have no slot and the output 0. `token_ids` int64 [B, T],
        for router.name=hash. Raises ValueError for inputs, masks or expert outputs of other shapes.
        """
        if token_ids is not None and self.config.router.name != "hash":
            raise TypeError(f"token_ids is for router.name=hash, not {self.config.router.name}")
        frame = None if self.context is None else self.context.current
        again = recomputing()
        units = units_of(x, self.config.route, self.input_dim, padding_mask, frame)
        if token_ids is None and frame is not None:
            token_ids = frame.inputs.input_ids
        tokens = Tokens(units.read, units.valid, token_ids, frame, again)
        choice: Choice = self.router(tokens)
        choice = self._with_capacity(choice, units.valid)
        y, backend = self._mixed(x, units, choice)
        y = self._completed(y, x, units, choice)
        return self._leave(y, choice, units.valid, backend, again)

    def _with_capacity(self, choice: Choice, valid: Tensor | None) -> Choice:
        factor = factor_of(self.config.capacity, self.training)
        if factor is None or choice.routing.expert_ids is None:
            return choice
        routing, limit = limited(choice.routing, valid, self.config.capacity, factor, self.num_experts)
        return replace(choice, routing=routing, limit=limit)

    def _mixed(self, x: Tensor, units: Units, choice: Choice) -> tuple[Tensor, str]:
        """The experts' share, [N, *out], and the back-end that made it."""
        plan, contract = self._plan(), self._contract_for(x)
        if self._fitness is None and contract == "pointwise":
            self._fitness = fitness(plan, units.x)
            check_backend(self.config.backend, self._fitness)
        if isinstance(choice, SoftChoice):
            return self._softly(plan, contract, units, choice)
        ids, weights = _flat(choice.routing)
        if contract in ("pointwise", "samples"):
            return dispatched(plan, units.x, (ids, weights), choice.limit, self.config.backend, self._fitness)
        whole = x if contract == "zeros" and x.dim() > 2 else units.read
        y = dispatched_whole(plan, whole, (ids, weights), contract, self.expert_forward if self._takes_mask else None)
        return y.flatten(0, whole.dim() - 2), "loop"

    def _softly(self, plan: ExpertPlan, contract: str, units: Units, choice: SoftChoice) -> tuple[Tensor, str]:
        """Slots that mix all tokens of a sequence, through their experts, mixed again."""
        assert choice.dispatch is not None
        assert choice.combine is not None
        x, slots = units.read, self.config.router.slots
        mixed = choice.dispatch.transpose(1, 2).to(x.dtype) @ x  # [B, S, d]
        batch, count = mixed.shape[:2]
        ids = (torch.arange(count, device=x.device) // slots).repeat(batch)[:, None]
        weights = torch.ones(ids.shape, dtype=choice.combine.dtype, device=x.device)
        if contract == "pointwise":
            rows = mixed.flatten(0, 1)
            limit = batch * slots
            out, backend = dispatched(plan, rows, (ids, weights), limit, self.config.backend, self._fitness)
        else:
            masked = self.expert_forward if self._takes_mask else None
            out, backend = dispatched_whole(plan, mixed, (ids, weights), contract, masked).flatten(0, 1), "loop"
        out = out.view(batch, count, -1)
        return (choice.combine.to(out.dtype) @ out).flatten(0, 1), backend

    def _completed(self, y: Tensor, x: Tensor, units: Units, choice: Choice) -> Tensor:
        """What beside the chosen experts makes the output, in the shape of the input."""
        config, routing = self.config, choice.routing
        rows = units.x
        if self.nulls.kinds:
            y = self.nulls(y, rows, *_flat(routing))
        if config.router.name == "depth" and config.router.residual == "inside":
            gate = routing.weights.reshape(-1, *(1,) * (y.dim() - 1))
            y = y + ((1 - gate) * alike(rows, y, "router.residual=inside")).to(y.dtype)
        for expert in self.shared:
            out = self.expert_forward(expert, units.read if config.route == "tokens" else rows)
            y = y + (out.flatten(0, 1) if config.route == "tokens" else out)
        if config.capacity.dropped == "identity" and routing.expert_ids is not None:
            idle = (routing.expert_ids < 0).all(-1).reshape(-1, *(1,) * (y.dim() - 1))
            if config.router.name in ("expert_choice", "depth"):  # a token that nobody took was not dropped
                idle = torch.zeros_like(idle) if units.valid is None else ~units.valid.reshape(idle.shape)
            y = torch.where(idle, alike(rows, y, "capacity.dropped").to(y.dtype), y)
        elif units.valid is not None:
            y = torch.where(units.valid.reshape(-1, *(1,) * (y.dim() - 1)), y, 0.0)
        if units.mask is not None:
            y = torch.where(units.mask.view(*units.mask.shape, *(1,) * (y.dim() - 2)), y, 0.0)
        return y.reshape(*x.shape[:-1], *y.shape[1:]) if config.route == "tokens" else y

    def _leave(self, y: Tensor, choice: Choice, valid: Tensor | None, backend: str, again: bool) -> Tensor:
        """`y`, after the losses, counts and listeners have had their part of this forward."""
        ledger, config = self.ledger, self.config
        frame = None if self.context is None else self.context.current
        loss = self._loss(choice, valid, again) if self.training else None
        if loss is not None and config.losses_mode == "inject" and torch.is_grad_enabled():
            y, loss = injected(y, loss * self.loss_share), None
        if again:
            if loss is not None and not ledger.had_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "losses_mode=collect under re-entrant checkpointing: the losses of the forward have no graph; use "
                    "use_reentrant=False, or losses_mode=inject"
                )
            return y
        ledger.had_grad = torch.is_grad_enabled()
        ledger.owe(loss, frame)
        routing = choice.routing.detach()
        ledger.latest = Latest(routing, self.num_choices, valid, backend)
        if self.training and config.router.bias_rate and routing.expert_ids is not None:
            ledger.count(slot_counts(routing.expert_ids, self.num_experts))
        if self.observers:
            mask = torch.ones(routing.weights.shape[:2], dtype=torch.bool, device=y.device) if valid is None else valid
            for observer in self.observers:
                observer(self, routing, mask)
        return y

    def _loss(self, choice: Choice, valid: Tensor | None, again: bool) -> Tensor | None:
        """Σ coefficient · loss; None if the block has none."""
        if not self.coefficients and not choice.penalties:
            return None
        slots = None
        if self.config.losses_over == "global" and choice.routing.expert_ids is not None:
            step = tuple(parameter._version for parameter in self.router.parameters())
            here = summed_over_ranks(slot_counts(choice.routing.expert_ids, self.num_experts))
            slots = self.ledger.in_step(here, step, again)
        losses = block_losses(list(self.coefficients), choice, valid, self.config, self.num_experts, slots)
        weighted = [self.coefficients[name] * value for name, value in losses.items()]
        if not again:
            self.ledger.losses = {name: value.detach() for name, value in {**losses, **choice.penalties}.items()}
        return torch.stack([*weighted, *choice.penalties.values()]).sum()

    # ---- what the experts are given
    def _plan(self) -> ExpertPlan:
        plain = type(self).expert_forward is MoEBlock.expert_forward
        return ExpertPlan(list(self.experts), self.expert_forward, self.config.route == "tokens", plain)

    def _contract_for(self, x: Tensor) -> str:
        """pointwise, sequence or zeros; samples where whole ones are routed. Probed once, if nobody said it."""
        if self._contract is None:
            if self.config.route != "tokens":
                self._contract = "samples"
            else:
                name = "" if self.layer_id is None else f" {self.layer_id}"
                self._contract = contract_of(self.config.contract, self._plan(), x, name)
        return self._contract

    # ---- what the latest forward left
    @property
    def num_choices(self) -> int:
        """E', the experts with the null ones."""
        return self.num_experts + len(self.config.null_experts)

    @property
    def choice_names(self) -> list[str]:
        """The columns of the routing matrix: experts by number, then the null ones by their kind."""
        return [*map(str, range(self.num_experts)), *self.config.null_experts]

    @property
    def latest(self) -> Latest:
        """What the latest forward left. Raises RuntimeError before the first."""
        if self.ledger.latest is None:
            raise RuntimeError("no forward yet: call the block first")
        return self.ledger.latest

    @property
    def last(self) -> Routing | None:
        """The latest routing [B, T, K] without graph, None before the first forward."""
        return None if self.ledger.latest is None else self.ledger.latest.routing

    @property
    def losses(self) -> dict[str, Tensor]:
        """The losses of the latest forward in training by name, without graph and coefficient."""
        return self.ledger.losses

    @property
    def aux_loss(self) -> Tensor:
        """Σ coefficient · loss of the latest forward, a scalar with graph; 0 in eval, and when aux_loss took it."""
        owed = self.ledger.owed
        return torch.stack(owed).sum() if owed else nothing_owed(self)

    @property
    def backend_used(self) -> str:
        """The back-end of the latest forward."""
        return self.latest.backend

    @property
    def batched_routing_matrix(self) -> Tensor:
        """Gates [B, T, E'], 0 where not chosen."""
        return self.latest.by_sample()

    @property
    def routing_matrix(self) -> Tensor:
        """Gates [N, E']."""
        return self.latest.by_sample().flatten(0, 1)

    @property
    def batched_experts_masks(self) -> Tensor:
        """Gates [E', B, T, 1]."""
        return self.latest.by_sample().permute(2, 0, 1)[..., None]

    @property
    def experts_masks(self) -> Tensor:
        """Gates [E', N, 1]."""
        return self.routing_matrix.t()[..., None]

    def experts_load(self) -> Tensor:
        """int64 [E', T]: how many samples chose each at each position, the null experts last."""
        return self.latest.load()

    def abs_experts_load(self) -> Tensor:
        """int64 [E']: how many slots each has."""
        return self.latest.load().sum(1)

    # ---- copies, names
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observers": [], "ledger": Ledger()}

    @staticmethod
    def convert_moefy_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of MoEfy's block under the names of this one: `router.expert_embs` [d, E'] is `weight` there."""
        found = {}
        for name, tensor in state.items():
            if name.endswith("router.expert_embs"):
                name, tensor = name.removesuffix("expert_embs") + "weight", tensor.t().contiguous()
            elif "router." in name and "noise" in name.rpartition(".")[2] and tensor.dim() == 2:
                name, tensor = name[: name.index("router.")] + "router.noise_weight", tensor.t().contiguous()
            found[name] = tensor
        return found

    def extra_repr(self) -> str:
        config = self.config
        parts = [] if self.layer_id is None else [f"layer_id={self.layer_id}"]
        parts += [f"num_experts={self.num_experts}", f"router={config.router.name}"]
        if config.router.name not in ("soft", "depth"):
            parts.append(f"k={config.k}")
        if config.null_experts:
            parts.append(f"null_experts={list(config.null_experts)}")
        return ", ".join([*parts, f"aggregation={config.aggregation}"])


def _flat(routing: Routing) -> tuple[Tensor, Tensor]:
    """Ids and weights [N, K]."""
    assert routing.expert_ids is not None
    k = routing.weights.shape[-1]
    return routing.expert_ids.reshape(-1, k), routing.weights.reshape(-1, k)
