"""MultiExpertModel: a backbone whose modules are mixtures of experts, under one router.

To the outside it stays a transformers model: forward, generate with KV cache, gradient checkpointing, Accelerate.
A router that asks for the backbone's hidden states (X-LoRA) gets a routing pass before each forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mole.adapters import Adapter
from mole.backbones.modules import device_of
from mole.mixtures import checkpointing, trainable
from mole.mixtures.auxiliary_losses import add_losses, as_tuple
from mole.mixtures.bare import BareCalls
from mole.mixtures.forward_inputs import check_supervision, inputs_of, wants_tuple
from mole.mixtures.forward_routing import given_routing, route
from mole.mixtures.generation import Generation
from mole.mixtures.listening import Listener, Observer, report
from mole.mixtures.output_mixture import closing
from mole.mixtures.packed import packed
from mole.mixtures.router_building import build_router
from mole.mixtures.two_pass.encoder_decoder import RoutedEncoder, check_widths, is_one
from mole.mixtures.two_pass.hidden_store import HiddenStore
from mole.mixtures.two_pass.routing_pass import Streams, can_cache, pass_inputs
from mole.mixtures.two_pass.speculation import SpeculationReport
from mole.mixtures.wrapping import MixtureOptions, expert_now, has_lora_bias, unwrap, without_norms, wrap
from mole.registry import unknown
from mole.routers import MixtureShape, Router
from mole.routing import Frame, Routing, RoutingContext, RoutingInputs


class MultiExpertModel(nn.Module, Generation):
    """`backbone` with `experts` (name → adapter, in the mixture's order) under the router of `router_config`.

    The backbone's modules are wrapped in place; `unload()` gives it back as it was. `tasks` names each expert's
    tasks; `train` what gets gradients: router, experts, both or none. `options` are those of `MixtureOptions`: kernel,
    modules_to_save, pooled_gate … Raises ValueError if an expert does not fit the backbone or cannot be mixed, or the
    router does not fit the experts.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        experts: Mapping[str, Adapter],
        router_config: Any,
        *,
        tasks: Mapping[str, tuple[str, ...]] | None = None,
        train: str = "router",
        kernel: str = "auto",
        expert_dropout: str = "auto",
        expert_dtype: str = "auto",
        modules_to_save: str = "error",
        pooled_gate: str = "auto",
        gate_lora_bias: bool = True,
        scaling_pass_dropout: bool = False,
        heads: Sequence[str] = (),
    ):
        super().__init__()
        if not experts:
            raise ValueError("a mixture needs at least one expert, got none")
        experts = without_norms(experts, router_config)
        self.backbone: Any = backbone
        self.context = RoutingContext()
        self.listeners: list[Listener] = []
        self.observers: list[Observer] = []
        self.losses: dict[str, float] = {}  # of the routing, in training: name → coefficient
        self.loss_options: dict[str, Any] = {}  # over and free_bits of `routing_losses`, on of `tokens_of`
        self.hidden_store: HiddenStore | None = None  # keeps the routing pass of training examples, if set
        self.speculation: SpeculationReport | None = None  # of the last `generate` with self_speculation
        self.options = MixtureOptions(
            kernel=kernel,
            expert_dropout=expert_dropout,
            expert_dtype=expert_dtype,
            modules_to_save=modules_to_save,
            pooled_gate=pooled_gate,
            gate_lora_bias=gate_lora_bias or not any(map(has_lora_bias, experts.values())),
            scaling_pass_dropout=scaling_pass_dropout,
            heads=tuple(heads),
        )
        check_widths(backbone)
        wrapped = wrap(backbone, experts, self.context, self.options)  # plain dicts: the backbone owns the modules
        self.layers, self.stand_ins, self._outlines = wrapped.layers, wrapped.stand_ins, wrapped.outlines
        known = tuple(tuple((tasks or {}).get(name, ())) for name in experts)
        width = backbone.config.get_text_config().hidden_size
        sites = tuple(self.layers)
        self.shape = MixtureShape(tuple(experts), known, sites=sites, hidden_size=width, closing=closing(self.layers))
        self.router: Router | None = None
        self.groups: dict[str, tuple[str, ...]] = {}  # of routers of the layers: name → the sites they serve
        self.router_config, self.streams = router_config, Streams()
        self.takes = set(signature(backbone.forward).parameters)
        self.can_cache, self.pass_inputs = can_cache(backbone), pass_inputs(backbone)
        try:
            checkpointing.bind(backbone, self.context)
            build_router(self)
            self.set_trainable(train)
            self._bare_calls = BareCalls(self)
        except ValueError:
            self.unload()
            raise

    # ---- what the model is
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the order that every routing uses."""
        return self.shape.expert_names

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the mixed modules, in the backbone's order: the layers of the routing log."""
        return tuple(self.layers)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Where the backbone's first parameter lives, or is brought to if it is offloaded."""
        return device_of(self.backbone)

    def routers(self) -> dict[str, Router]:
        """Every router: under "" the one of the whole model, or one per site."""
        if self.router is not None:
            return {"": self.router}
        return {site: layer.router for site, layer in self.layers.items() if layer.router is not None}

    def adapters(self) -> dict[str, Adapter]:
        """The experts as they are now, name → adapter; tensors are views of the model's."""
        found = {}
        for index, name in enumerate(self.expert_names):
            found[name] = expert_now(self._outlines[name], index, self.layers)
        return found

    def trained_modules(self) -> dict[str, nn.Module]:
        """Path → the new copy of a whole module that is trained with the router (modules_to_save=train)."""
        trains = self.options.modules_to_save.partition(":")[0] == "train"
        return {path: standing.module for path, standing in self.stand_ins.items()} if trains else {}

    def set_trainable(self, train: str) -> None:
        """router, experts, both or none: exactly these parameters get a gradient, and with router.mode base_ft or
        full_ft the backbone's.
        """
        trainable.set_trainable(self, train)

    def parameter_settings(self) -> dict[str, dict[str, float]]:
        """Name of a parameter → its own `lr` and `weight_decay`, where the router's config sets them, and `clip` 0
        where it takes no part in the clipping of gradients.
        """
        return trainable.parameter_settings(self)

    def unload(self) -> PreTrainedModel:
        """Gives the backbone back: every wrapped module is the object that it was."""
        if "_bare_calls" in vars(self):  # not where the router did not fit
            self._bare_calls.remove()
        unwrap(self.backbone, {**self.layers, **self.stand_ins})
        self.layers, self.stand_ins = {}, {}
        return self.backbone

    # ---- one forward
    def forward(  # the inputs that `generate` looks for by name, then mole's own
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        task_names: Any = None,
        texts: Any = None,
        prompt_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        expert_labels: Tensor | None = None,
        labels: Tensor | None = None,
        routing: Mapping[str, float] | Routing | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward with the mixtures at work: its inputs, its output.

        `task_names`, `texts` (of the prompts, one per example) and `prompt_mask` (bool [B, T]) are for routers that
        need them. `segment_ids` (int64 [B, T]) tells the samples of packed rows apart (see `Packing`): `task_names` and
        `texts` are then one for each sample, there is no `attention_mask`, and the backbone finds the borders by
        `position_ids`, which are made where they are missing. With a router that needs a routing pass,
        `past_key_values` of the output is a `TwoStreamCache`. In training, `losses` (name → coefficient) gives the
        output `auxiliary_loss`, their weighted sum, and `auxiliary_losses`, each by name; `expert_labels` (int64 [B] or
        [B, T], -100: none; of packed rows one for each sample) tells the right experts, else the tasks do. `routing` is
        spent in the place of the router's, as in `fixed_routing`.
        """
        check_supervision(self, expert_labels)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "logits_to_keep": logits_to_keep,
            "labels": labels,
        }
        inputs = inputs_of(self, given, kwargs, use_cache)
        nameless = wants_tuple(self, inputs)
        names, prompts = (None if one is None else tuple(one) for one in (task_names, texts))
        seen = RoutingInputs(names, prompts, input_ids, attention_mask, prompt_mask)
        seen, packing = packed(self, seen, segment_ids, inputs)
        goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
        frame = replace(self.new_frame(seen), goes_on=goes_on, logits_to_keep=logits_to_keep, packing=packing)
        frame.fixed = frame.fixed if routing is None else given_routing(self, routing)
        recording, phase = frame.recording, self.phase(past_key_values, frame)
        with self.context.push(frame):
            pair = route(self, frame, inputs)
            output = self.backbone(**inputs)
        if pair is not None and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = pair
        if recording:
            self.report(frame, phase)
        add_losses(self, output, frame, expert_labels)
        return as_tuple(output) if nameless else output

    def new_frame(self, inputs: RoutingInputs) -> Frame:
        """The frame of a forward with these inputs, as the contexts around it want it."""
        outer = self.context.current or Frame()
        return Frame(
            inputs=inputs.over(outer.inputs),
            experts_enabled=outer.experts_enabled,
            fixed=outer.fixed,
            router=outer.router,
            recording=outer.experts_enabled
            and bool(self.listeners or self.observers or (self.losses and self.training)),
            generating=outer.generating,
            kept=outer.kept,
        )

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder with the mixtures at work, for `generate`; other encoders as the backbone gives them."""
        if args or kwargs or not is_one(self.backbone):
            return self.backbone.get_encoder(*args, **kwargs)
        return RoutedEncoder(self)

    # ---- what is seen of the routing
    def phase(self, cache: Any, frame: Frame) -> str:
        """train, eval, prefill or decode."""
        if not frame.generating:
            return "train" if self.training else "eval"
        return "decode" if cache is not None and cache.get_seq_length() > 0 else "prefill"

    def report(self, frame: Frame, phase: str) -> None:
        """One record for this forward, to each listener and observer."""
        report(self, frame, phase)

    @contextmanager
    def experts_off(self) -> Iterator[None]:
        """The plain backbone inside the body, for forward and generate."""
        with self.context.push(replace(self.context.current or Frame(), experts_enabled=False)):
            yield

    @contextmanager
    def fixed_routing(self, weights: Mapping[str, float] | Routing) -> Iterator[None]:
        """Every layer spends this routing inside the body, whatever the router: name → weight (others 0), or data."""
        with self.context.push(replace(self.context.current or Frame(), fixed=given_routing(self, weights))):
            yield

    @contextmanager
    def fixed_weights(self, **weights: float) -> Iterator[None]:
        """Every layer mixes these branches inside the body: names of experts and `base`, those not named with 0."""
        for name in weights:
            if name not in (*self.expert_names, "base"):
                raise ValueError(unknown("branch", name, [*self.expert_names, "base"]))
        row = [float(weights.get(name, 0.0)) for name in self.expert_names]
        made = torch.tensor(row, device=self.device).view(1, 1, -1)
        base = torch.tensor(float(weights.get("base", 0.0)), device=self.device).view(1, 1, 1)
        with self.fixed_routing(Routing(made, base=base)):
            yield

    @contextmanager
    def routed_by(self, router: Router) -> Iterator[None]:
        """Another router of scope `model` in the place of the model's own inside the body."""
        with self.context.push(replace(self.context.current or Frame(), router=router.to(self.device))):
            yield

    # ---- training
    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            "nn.DataParallel copies a model for each device into a thread, and layers of such copies find no routing: "
            "use one process per device, as mole's launcher, Accelerate or DistributedDataParallel do"
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options: Any
    ) -> None:
        """Non-reentrant only: the recomputation re-enters the frame of its forward, which reentrant mode cannot."""
        checkpointing.enable(self.backbone, self.context, activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """The same under its older name."""
        checkpointing.enable(self.backbone, self.context, gradient_checkpointing_kwargs, **options)
