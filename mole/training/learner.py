"""What learns: the trainable parameters of a model with their optimizer and schedule, and their state as plain data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mole.training.loss import Objective
from mole.training.optimizers import build_optimizer
from mole.training.schedules import build_schedule
from mole.training.settings import TrainingSettings


@dataclass
class Learner:
    """A model under training. `parameters`: the trainable ones by name; `buffers`: what lies beside them.

    `clipped`: those whose gradients count in the norm that is clipped.
    """

    model: nn.Module
    objective: Objective
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    optimizer: AcceleratedOptimizer
    schedule: LambdaLR
    accelerator: Accelerator
    clipped: list[nn.Parameter]

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def sum_gradients(self) -> None:
        """Every process gets the sum of all processes' gradients; what none of them used stays without one.

        Once a step, in one message: what is trained beside a frozen backbone is small. Unlike DDP's buckets this
        takes parameters that a process did not use (an expert that no token of it chose) as they come.
        """
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.parameters.values())
        uses = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        uses = self._summed(uses.to(self.accelerator.device)).tolist()
        used = [parameter for parameter, count in zip(parameters, uses, strict=True) if count]
        for dtype in sorted({parameter.dtype for parameter in used}, key=str):
            members = [parameter for parameter in used if parameter.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            total = self._summed(torch.cat([gradient.flatten() for gradient in gradients]))
            for parameter, part in zip(members, total.split([p.numel() for p in members]), strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def _summed(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, "sum")
        assert isinstance(total, Tensor)
        return total

    # ---- state
    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and buffers by name: the live tensors."""
        return {**{name: parameter.detach() for name, parameter in self.parameters.items()}, **self.buffers}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copies `weights` into the model. Raises ValueError if the names or shapes are others."""
        mine = self.weights()
        shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
        given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != given:
            odd = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))[:3]
            detail = "; ".join(
                f"{name}: {given.get(name, 'absent')} in it, {shapes.get(name, 'absent')} here" for name in odd
            )
            raise ValueError(f"the checkpoint is of another model ({detail}): use the run's own config, or start anew")
        with torch.no_grad():
            for name, tensor in weights.items():
                mine[name].copy_(tensor)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's tensors under "<parameter>:<slot>", and what else it holds, as JSON takes it."""
        state = self.optimizer.state_dict()
        names = self._names_by_index()
        tensors, scalars = {}, {}
        for index, slots in state["state"].items():
            for slot, value in slots.items():
                (tensors if isinstance(value, Tensor) else scalars)[f"{names[index]}:{slot}"] = value
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
        return tensors, {"groups": groups, "scalars": scalars}

    def load_optimizer_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of `optimizer_state`. Raises ValueError if its parameters are others."""
        names = self._names_by_index()
        if [name for group in facts["groups"] for name in group["params"]] != list(names.values()):
            raise ValueError("the checkpoint's optimizer is over other parameters: use the run's own config")
        indices = {name: index for index, name in names.items()}
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**tensors, **facts["scalars"]}.items():
            name, _, slot = key.rpartition(":")
            state.setdefault(indices[name], {})[slot] = value
        groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in facts["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def schedule_state(self) -> dict[str, Any]:
        """How far the schedule is."""
        return {"last_epoch": self.schedule.last_epoch, "step_count": self.schedule._step_count}

    def load_schedule_state(self, facts: dict[str, Any]) -> None:
        """Goes on from there; the rates follow this run's length, which may have changed."""
        self.schedule.last_epoch, self.schedule._step_count = facts["last_epoch"], facts["step_count"]
        factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(self.schedule.base_lrs, factors, strict=True)]
        self.schedule._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _names_by_index(self) -> dict[int, str]:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        members = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {index: names[id(parameter)] for index, parameter in enumerate(members)}


def build_learner(model: nn.Module, config: TrainingSettings, accelerator: Accelerator, total: int) -> Learner:
    """Optimizer and schedule over what `model` leaves trainable, for a run of `total` steps.

    Raises ValueError if nothing is trainable or a trainable weight is in half precision, where small steps vanish.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(
            "nothing is trainable: every parameter has requires_grad=False; attach an adapter, or let the router train"
        )
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trainable in {str(parameter.dtype).removeprefix('torch.')}: trainable weights are kept in "
                f"float32, with training.precision={'fp16' if parameter.dtype == torch.float16 else 'bf16'} around them"
            )
    if any(tensor.device != accelerator.device for tensor in model.parameters()):
        model.to(accelerator.device)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = model.parameter_settings() if hasattr(type(model), "parameter_settings") else {}  # type: ignore[operator]
    optimizer = build_optimizer(config.optimizer, parameters, config.training.learning_rate, own)
    schedule = build_schedule(config.schedule, optimizer, total)
    prepared = accelerator.prepare_optimizer(optimizer)
    assert isinstance(prepared, AcceleratedOptimizer)
    learner = Learner(
        model=model,
        objective=Objective(model),
        parameters=parameters,
        buffers=_buffers_beside(model, parameters),
        optimizer=prepared,
        schedule=schedule,
        accelerator=accelerator,
        clipped=[p for name, p in parameters.items() if own.get(name, {}).get("clip", 1.0)],
    )
    if accelerator.num_processes > 1:
        for tensor in learner.weights().values():
            tensor.copy_(broadcast(tensor.contiguous()))
    return learner


def _buffers_beside(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Saved buffers of the modules that own a trainable parameter: a router's running load, a norm's statistics."""
    owners = {name.rpartition(".")[0] for name in parameters}
    saved = set(model.state_dict(keep_vars=True))
    return {
        name: tensor for name, tensor in model.named_buffers() if name in saved and name.rpartition(".")[0] in owners
    }


@contextmanager
def gradient_checkpointing(model: nn.Module, active: bool) -> Iterator[None]:
    """Activations are recomputed in the backward pass inside the body, without reentrance.

    Non-reentrant recomputation needs no input that requires a gradient: those of adapters arrive over a frozen start.
    Raises ValueError if the model cannot do it.
    """
    if not active:
        yield
        return
    kinds = ("activation_checkpointing", "gradient_checkpointing")  # the name of transformers 6, and the one before
    # of the class: a model that hands unknown names on to the one inside it has a way of its own to enable this
    known = [f"{kind}_enable" for kind in kinds if hasattr(type(model), f"{kind}_enable")]
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing: set training.gradient_checkpointing=false"
        )
    getattr(model, known[0])({"use_reentrant": False})
    try:
        yield
    finally:
        disable = next(name for kind in kinds if hasattr(model, name := f"{kind}_disable"))
        getattr(model, disable)()
