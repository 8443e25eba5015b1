"""XLoraModel: a MultiExpertModel under X-LoRA's router, with the methods that X-LoRA's and PEFT's users call.

It is a subclass, as what it wraps has to stay a transformers model (generate, Accelerate, checkpointing inspect the
class itself); it adds the historic API, and the two passes are those of its base. Buehler & Buehler 2024,
arXiv 2402.07148.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mole.adapters import Adapter
from mole.mixtures import MultiExpertModel
from mole.mixtures.forward_inputs import check_standing
from mole.routers import XLoraRouter
from mole.xlora import originals
from mole.xlora.classifier import ClassifierView, dense_gates
from mole.xlora.config import xLoRAConfig
from mole.xlora.options import BUILT_IN, existing_device, mixture_options
from mole.xlora.places import ReadExpert
from mole.xlora.saving import LAYOUTS, save_checkpoint
from mole.xlora.scalings import ScalingsLog


class XLoraModel(MultiExpertModel):
    """`backbone` with `experts` (name → expert, in the order of the gates) and a fresh router, in eval mode.

    The backbone's modules are wrapped in place; `unload()` gives them back. `config` of the model is the backbone's, as
    transformers wants it; X-LoRA's own is `xlora_config`, whose fields may be assigned at any time. Raises ValueError
    for a config that does not fit the backbone or the experts, and for experts that do not fit the backbone.
    """

    router: XLoraRouter

    def __init__(self, backbone: PreTrainedModel, config: xLoRAConfig, experts: Mapping[str, Adapter | ReadExpert]):
        hidden = backbone.config.get_text_config().hidden_size
        config = copy.deepcopy(config)
        config.check(experts=len(experts), hidden=hidden)
        if config.scaling_pass_value is None:
            config.scaling_pass_value = 1.0 / len(experts)
        if config.device is not None:
            existing_device(config.device)
        read = {name: e if isinstance(e, ReadExpert) else ReadExpert(e) for name, e in experts.items()}
        super().__init__(
            backbone,
            {name: expert.adapter for name, expert in read.items() if expert.adapter is not None},
            config.router(),
            train="both" if config.use_trainable_adapters else "router",
            **mixture_options(config),
        )
        config.hidden_size = hidden
        self.xlora_config = config
        now = self.adapters()
        self.sources = {name: originals.kept(expert, now[name]) for name, expert in read.items()}
        self.scalings_log = ScalingsLog(self.listeners, self.sites, self.expert_names)
        self._trains_experts = config.use_trainable_adapters
        self._mark_trained()
        self._built = {name: getattr(config, name) for name in BUILT_IN}
        config.changed = False
        self._positions = tuple(signature(backbone.forward).parameters)
        if config.device is not None:
            self.router.to(config.device)
        self.eval()

    # ---- settings
    def _sync(self) -> None:
        """Lets assigned fields act. Raises ValueError for invalid ones, and for what the model was built with."""
        check_standing(self)
        config = self.xlora_config
        if not config.changed:
            return
        config.check(experts=self.shape.num_experts, hidden=self.shape.hidden_size)
        for name, built in self._built.items():
            if getattr(config, name) != built:
                raise ValueError(
                    f"{name}: got {getattr(config, name)!r}, need {built!r}, with which the model was built; "
                    "assign it back, or build a new model"
                )
        if config.scaling_pass_value is None:
            config.scaling_pass_value = 1.0 / self.shape.num_experts
        self.router.configure(config.router())
        self.router_config = self.router.config
        if config.use_trainable_adapters != self._trains_experts:
            for layer in self.layers.values():
                layer.bank.requires_grad_(config.use_trainable_adapters)
            self._trains_experts = config.use_trainable_adapters
            self._mark_trained()
        config.changed = False

    def _mark_trained(self) -> None:
        """Experts that are or were trainable are no longer what their files say."""
        if self._trains_experts:
            self.sources = {name: replace(expert, changed=True) for name, expert in self.sources.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XLoraModel:
        """Moves everything; frozen experts that another dtype would round are kept aside for their files."""
        if originals.rounds(self, fn):
            self.sources = originals.before_rounding(self.sources, self.adapters)
        super()._apply(fn, recurse)
        return self

    def _set(self, name: str, value: Any) -> None:
        """Assigns one field, which acts at once; an invalid value leaves everything as it was."""
        before = getattr(self.xlora_config, name)
        setattr(self.xlora_config, name, value)
        try:
            self._sync()
        except ValueError:
            setattr(self.xlora_config, name, before)
            raise

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The gate of every expert in the first pass; None: 1/E, which the config then shows."""
        self._set("scaling_pass_value", value)

    def set_global_scaling_weight(self, weight: float) -> None:
        """The factor of all gates in both passes."""
        self._set("global_scaling_weight", weight)

    def get_global_scaling_weight(self) -> float:
        """The factor of all gates, as the config says it."""
        return self.xlora_config.global_scaling_weight

    set_global_lora_weight = set_global_scaling_weight
    get_global_lora_weight = get_global_scaling_weight

    def set_topk_lora(self, value: int | None) -> None:
        """Only the k experts with the largest scalings of each token work; None: all."""
        self._set("top_k_lora", value)

    def get_topk_lora(self) -> int | None:
        """How many experts of each token work; None: all."""
        return self.xlora_config.top_k_lora

    def set_use_trainable_adapters(self, use_trainable_adapters: bool) -> None:
        """Whether the experts get gradients; the router's stay as they are. Make the optimizer after this."""
        self._set("use_trainable_adapters", use_trainable_adapters)

    def get_use_trainable_adapters(self) -> bool:
        """Whether the experts get gradients, as the config says it."""
        return self.xlora_config.use_trainable_adapters

    # ---- forward and generate
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Both passes: the backbone's inputs, by place (in the backbone's own order) or by name, and its output."""
        _refuse_adapter_names(kwargs)
        for name, value in zip(self._positions, args, strict=False):
            if name in kwargs:
                raise TypeError(f"forward: {name} was given twice, by place and by name")
            kwargs[name] = value
        if len(args) > len(self._positions):
            raise TypeError(f"forward takes {len(self._positions)} arguments by place, got {len(args)}")
        self._sync()
        return super().forward(**kwargs)

    # `generate` and trainers look for the names of inputs there.
    forward.__signature__ = signature(MultiExpertModel.forward)  # type: ignore[attr-defined]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, exact with the two caches; `use_cache=False` recomputes. Flags stay as they are."""
        _refuse_adapter_names(kwargs)
        self._sync()
        return super().generate(*args, **kwargs)

    def disable_adapter(self) -> Any:
        """Context: the plain base inside the body, for forward and generate, without a first pass; it nests."""
        return self.experts_off()

    # ---- what the router said
    def get_latest_scalings(self) -> Tensor | None:
        """σ [B, S, L, E] of the last forward, without graph; None before the first."""
        latest = self.router.latest
        return None if latest is None else latest.scalings.expand(-1, -1, len(self.layers), -1)

    def get_latest_gates(self) -> Tensor | None:
        """What the layers spent in the last forward, [B, S, L, E]: after top-k, with the global weight."""
        latest = self.router.latest
        if latest is None:
            return None
        gates = dense_gates(latest.gates, latest.ids, self.shape.num_experts)
        return gates.expand(-1, -1, len(self.layers), -1)

    def effective_gates(self, scalings: Tensor, layer: int | str) -> Tensor:
        """σ [B, S, L, E] → the gates [B, S, E] of one layer (its index or path): top-k, its softmax, global weight."""
        self._sync()
        index = self.sites.index(layer) if isinstance(layer, str) else layer
        gates, ids = self.router.gates(scalings[:, :, index : index + 1])
        return dense_gates(gates, ids, self.shape.num_experts)[:, :, 0]

    def enable_scalings_logging(
        self,
        *,
        max_entries: int | None = None,
        max_bytes: int | None = 2**30,
        every: int = 1,
        spill_dir: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
    ) -> None:
        """Keeps σ of every forward from now on. Over a limit, entries go to `spill_dir`, or the oldest are dropped."""
        limits = {"max_entries": max_entries, "max_bytes": max_bytes, "every": every}
        self.scalings_log.start({**limits, "spill_dir": spill_dir, "dtype": dtype})

    def disable_scalings_logging(self, clear: bool = False) -> None:
        """Stops it. The log is kept, as later versions did; `clear=True` forgets it, as the first did."""
        self.scalings_log.stop(clear)

    def clear_scalings_log(self) -> None:
        """Forgets what was logged."""
        self.scalings_log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """σ of every forward logged, float32 [B, S, L, E] each, on the CPU, without graph; a list of its own."""
        return self.scalings_log.entries()

    def get_scalings_sequences(self) -> list[Tensor]:
        """As the log, with the forwards of one generate call joined along S."""
        return self.scalings_log.sequences()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """S → (places in the log, their tensors)."""
        return self.scalings_log.buckets()

    def flush_log_scalings(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        allow_disabled: bool = False,
        index: bool = False,
    ) -> list[Path]:
        """Writes the log under `path` (no extension), then clears it; `index` adds what `mole plot` needs.

        Raises RuntimeError if logging is off (unless `allow_disabled`), ValueError if the log is empty,
        FileExistsError if one is there.
        """
        return self.scalings_log.flush(path, overwrite=overwrite, allow_disabled=allow_disabled, index=index)

    def print_scalings_predictions(self, n_predictions_lifetime: int) -> None:
        """Prints σ of the next n forwards."""
        if type(n_predictions_lifetime) is not int or n_predictions_lifetime < 0:
            raise ValueError(f"n_predictions_lifetime: got {n_predictions_lifetime!r}, need a whole number from 0")
        self.scalings_log.show(n_predictions_lifetime)

    # ---- parameters and files
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers, each parameter once; packed and sharded ones count in full."""
        counts = [(_size(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio in percent, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        *,
        layouts: tuple[str, ...] = LAYOUTS,
        experts: str = "embed",
        is_main_process: bool = True,
        state_dict: None = None,
    ) -> None:
        """Writes router, config, card and experts (`reference`: their places only) as a folder that mole, the original
        X-LoRA and, where they can, PEFT and mistral.rs read.

        By default the layout of PEFT is left out, with the reason on the card, where PEFT cannot hold the model; asked
        for by name it raises ValueError. A save that fails leaves an earlier checkpoint as it was.
        """
        self._sync()
        if not safe_serialization:
            raise ValueError("safe_serialization: got False, need True; mole writes safetensors only, never pickles")
        if state_dict is not None:
            raise ValueError(
                "state_dict: got tensors, need None; a checkpoint holds router and experts as the model has them: load "
                "the tensors into the model first, or gather its shards, and leave state_dict out"
            )
        if is_main_process:
            save_checkpoint(self, Path(save_directory), layouts=layouts, experts=experts)

    def export_ordering(self, path: str | os.PathLike[str]) -> None:
        """Writes the ordering file of mistral.rs. Raises ValueError for what it cannot run."""
        from mole.xlora.mistralrs import write_ordering

        self._sync()
        write_ordering(self, Path(path))

    # ---- for programs written for X-LoRA and PEFT
    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the gates."""
        return self.expert_names

    @property
    def internal_xlora_classifier(self) -> ClassifierView:
        """The router as PEFT's programs look at it."""
        return ClassifierView(self)

    @property
    def internal_xlora_scalings(self) -> Tensor | None:
        """The latest scalings under PEFT's name."""
        return self.get_latest_scalings()

    @property
    def base_model(self) -> XLoraModel:
        """The model itself: PEFT's programs reach X-LoRA's methods through `base_model`."""
        return self

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no weights equal the mixture."""
        raise ValueError("merge: the gates depend on the input, so no weights equal the mixture; use unload()")

    merge_adapter = merge_and_unload

    def load_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: experts are fixed when the model is built."""
        raise ValueError("experts and their order are fixed when the model is built: unload() and build a new one")

    delete_adapter = set_adapter = load_adapter


XLoraModel.__name__ = "XLoraModel"
xLoRAModel = XLoraModel


def _size(parameter: Tensor) -> int:
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    if shape is not None:  # 4-bit: packed
        return int(torch.Size(shape).numel())
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())  # DeepSpeed's shards know their full size


def _refuse_adapter_names(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("adapter_names", None) is not None:
        raise ValueError("adapter_names: the router chooses the experts of every token; use fixed_routing to choose")
