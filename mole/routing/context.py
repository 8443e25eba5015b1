"""The routing context: what the layers of one model share during one forward, as a stack of frames per thread.

One object per model, held by reference in its mixture layers; no global. A model's forward pushes a frame and pops
it; `generate` pushes an outer one for the whole call, from which inner frames inherit their inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from mole.routing.packing import Packing
from mole.routing.routing import Routing


@dataclass(frozen=True)
class RoutingInputs:
    """What a router may ask for beside the hidden states.

    `task_names`     one name per example.
    `texts`          the prompt of each example, as text.
    `input_ids`      int64 [B, T].
    `attention_mask` [B, T], 1 at valid tokens.
    `prompt_mask`    bool [B, T], true at valid tokens of the prompt.
    `hidden_states`  [B, T, H], last hidden state of the routing pass.
    `embeddings`     [B, T, H], the backbone's embeddings of the input ids, without what experts add to them.
    `encoder_states` [B, S, H], what the encoder of this forward gave to the decoder.
    """

    task_names: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    prompt_mask: Tensor | None = None
    hidden_states: Tensor | None = None
    embeddings: Tensor | None = None
    encoder_states: Tensor | None = None

    def over(self, outer: RoutingInputs | None) -> RoutingInputs:
        """These inputs, and the outer frame's where this one has none."""
        if outer is None:
            return self
        missing = {f.name: getattr(outer, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **missing)


@dataclass
class Frame:
    """One forward: its inputs, the routings that layers spend, and what is recorded.

    `fixed`    a routing that stands in for every router (see `MultiExpertModel.fixed_routing`).
    `router`   a router of model scope that stands in for the model's own (see `MultiExpertModel.routed_by`).
    `routings` site → routing, made by a router of model scope before the layers run.
    `shared`   group of modules → the routing that its first module made, for the others.
    `kept`     group or site → the routing per example that was made at the prompt, or a router's own state with
               `reorder(rows)`; one dict for a whole `generate`.
    `goes_on`  whether this forward continues a cache: the prompt was read before.
    `seen`     site → routing as spent, filled by the layers if `recording`.
    `notes`    what a router must find again when this forward is computed a second time (gradient checkpointing).
    `penalties` (name, place) → a scalar with graph that a router adds to the loss of this forward in training.
    `packing`  where the samples lie, if rows hold several; `inputs` are then those of the samples, one a row.
    `logits_to_keep` the positions that the output head sees: as many from the end (0: all), or an index; None: all.
    """

    # torch.compile follows functions, not classes
    inputs: RoutingInputs = field(default_factory=lambda: RoutingInputs())
    experts_enabled: bool = True
    fixed: Routing | None = None
    router: Any = None
    routings: dict[str, Routing] = field(default_factory=dict)
    shared: dict[str, Routing] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    recording: bool = False
    seen: dict[str, Routing] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    penalties: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    generating: bool = False
    logits_to_keep: int | Tensor | None = None
    packing: Packing | None = None

    def see(self, site: str, routing: Routing) -> None:
        """Notes the routing as spent at `site`, if this forward is recorded; of packed rows that of each sample."""
        if self.recording:
            self.seen[site] = routing.apart or routing

    def penalise(self, name: str, place: str, value: Tensor) -> None:
        """Adds `value` to the loss, once for each `place`: a recomputation adds nothing."""
        self.penalties.setdefault((name, place), value)

    def need(self, name: str, router: str) -> Any:
        """The input `name`, or a ValueError that says which router misses it."""
        value = getattr(self.inputs, name)
        if value is None:
            raise ValueError(
                f"router={router} needs {name}, and this forward was given none: pass {name}=… to the model"
            )
        return value


class _Stack(threading.local):
    """The frames of one thread; made with its first look at them, so that no code asks whether they are there."""

    def __init__(self):
        self.frames: list[Frame] = []


class RoutingContext:
    """The stack of frames of one model. Copies and pickles as a context with an empty stack."""

    def __init__(self):
        self._stack = _Stack()

    @property
    def current(self) -> Frame | None:
        """The innermost frame of this thread, None outside a forward."""
        frames = self._stack.frames
        return frames[-1] if frames else None

    @contextmanager
    def push(self, frame: Frame) -> Iterator[Frame]:
        """Makes `frame` the current one for the body."""
        self.begin(frame)
        try:
            yield frame
        finally:
            self.end()

    def begin(self, frame: Frame) -> None:
        """Makes `frame` the current one, until `end`: for hooks, which have no body."""
        self._stack.frames.append(frame)

    def end(self) -> None:
        """Takes the current frame away."""
        self._stack.frames.pop()

    def checkpoint_contexts(self):
        """`context_fn` of torch's non-reentrant checkpointing: the recomputation sees the frame of its forward.

        The recomputation records nothing: each routing was seen once already. What a module shares with its group it
        makes anew, if it is recomputed itself.
        """
        frame = self.current
        if frame is None:
            return nullcontext(), nullcontext()
        return nullcontext(), self.push(replace(frame, recording=False, shared=dict(frame.shared)))

    def __deepcopy__(self, memo: dict) -> RoutingContext:
        memo[id(self)] = fresh = RoutingContext()
        return fresh

    def __reduce__(self):
        return (RoutingContext, ())
