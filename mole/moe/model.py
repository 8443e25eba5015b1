"""A model with blocks as the training loop wants it: its losses beside the logits, its routings told to who listens."""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from mole.moe.block import MoEBlock
from mole.moe.collecting import aux_loss, update_router_bias
from mole.moe.surgery import surgery_of
from mole.routing import Frame, Routing, RoutingInputs
from mole.routing.listening import Listener, Observer, tell

TRAINS = ("router", "experts", "all")


class MoEModel(nn.Module):
    """`model`, on which `moefy` was at work; its blocks are the sites of the routing log.

    `listeners` and `observers` are told of every forward's routing, as those of a mixture of adapters. Raises
    ValueError if there are no blocks, or blocks with other numbers of experts: a log has one list of them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.record = surgery_of(model)
        blocks = {wrapped.names[0]: wrapped.block for wrapped in self.record.wrapped}
        names = {tuple(block.choice_names) for block in blocks.values()}
        if len(names) > 1:
            raise ValueError(f"blocks with unlike experts cannot share a routing log: {sorted(names, key=len)}")
        self.sites, self.expert_names = tuple(blocks), names.pop()
        self.listeners: list[Listener] = []
        self.observers: list[Observer] = []
        self._names = {id(block): name for name, block in blocks.items()}
        self._seen: dict[str, Routing] = {}
        for block in blocks.values():
            block.observers.append(self._note)

    @property
    def blocks(self) -> dict[str, MoEBlock]:
        """Name → block."""
        return {wrapped.names[0]: wrapped.block for wrapped in self.record.wrapped}

    @property
    def config(self) -> Any:
        """The dense model's configuration."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The dense model's settings of generation."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def set_trainable(self, train: str) -> None:
        """router, experts or all of both get gradients; what lies outside the blocks gets none."""
        assert train in TRAINS
        self.model.requires_grad_(False)
        for block in self.blocks.values():
            block.requires_grad_(train != "router")
            block.router.requires_grad_(train != "experts")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_names: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward: `input_ids` and `attention_mask` [B, T] → its output.

        In training the output has `auxiliary_loss`, what the blocks' losses come to, and `auxiliary_losses` by name.
        """
        self._seen = {}
        if use_cache is not None:
            kwargs["use_cache"] = use_cache
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._tell(input_ids, attention_mask, task_names, "train" if self.training else "eval")
        if self.training:
            output.auxiliary_loss, output.auxiliary_losses = aux_loss(self.model), self._losses()
        return output

    def generate(
        self, *args: Any, task_names: Any = None, texts: Any = None, self_speculation: bool = False, **kwargs: Any
    ) -> Any:
        """The model's own `generate`, whose forwards listeners are told of too. `texts` are for routers of adapters.

        Raises ValueError for self-speculation, which needs a routing pass.
        """
        if self_speculation:
            raise ValueError("self_speculation drafts with a routing pass, and blocks have none: leave it out")
        phases = chain(["prefill"], repeat("decode"))

        def told(model: nn.Module, given: Any, named: dict[str, Any], output: Any) -> None:
            self._tell(named.get("input_ids"), named.get("attention_mask"), task_names, next(phases))

        handle = self.model.register_forward_hook(told, with_kwargs=True)
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            handle.remove()

    def _tell(self, input_ids: Tensor | None, attention_mask: Tensor | None, task_names: Any, phase: str) -> None:
        """Tells who listens of the routings that the blocks noted in this forward."""
        seen, self._seen = self._seen, {}
        if self.listeners or self.observers:
            names = None if task_names is None else tuple(task_names)
            inputs = RoutingInputs(task_names=names, input_ids=input_ids, attention_mask=attention_mask)
            frame = Frame(inputs=inputs, seen=seen)
            tell(frame, phase, self.sites, len(self.expert_names), self.listeners, self.observers)

    def _losses(self) -> dict[str, Tensor]:
        """Each loss by name, without its coefficient: the mean over the blocks that have it."""
        found: dict[str, list[Tensor]] = {}
        for block in self.blocks.values():
            for name, value in block.losses.items():
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _note(self, block: MoEBlock, routing: Routing, mask: Tensor | None) -> None:
        if self.listeners or self.observers:
            self._seen[self._names[id(block)]] = routing

    @torch.no_grad()
    def after_step(self) -> None:
        """What follows each update of the weights: the routers' biases move towards balance."""
        update_router_bias(self.model)

    # ---- training
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Non-reentrant, with the frame of its forward for each recomputation."""
        options = {**(gradient_checkpointing_kwargs or {}), **checkpointing(self.model)}
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(options)

    def gradient_checkpointing_disable(self) -> None:
        """Activations are kept again."""
        disable = getattr(self.model, "activation_checkpointing_disable", None)
        (disable or self.model.gradient_checkpointing_disable)()


def checkpointing(model: nn.Module) -> dict[str, Any]:
    """`gradient_checkpointing_kwargs` with which a recomputation sees the attention mask of its forward."""
    return {"use_reentrant": False, "context_fn": surgery_of(model).root.context.checkpoint_contexts}
