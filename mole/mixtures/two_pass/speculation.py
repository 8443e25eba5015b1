"""Self-speculative decoding: the routing pass drafts the next token, so that one forward does both passes.

A model with a routing pass reads its weights twice for a token: pass 1 for the routing, pass 2 to spend it. Pass 1 is
the plain backbone, and with the head it also guesses the token after it. So pass 2 of token t and pass 1 of the
guessed token t+1 run as two rows of one batch, with one read of the weights; only where the guess turns out wrong is
pass 1 done again for the right token. What is generated is exact: the same tokens when greedy; when sampling the same
distribution, by the acceptance rule of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mole.mixtures.two_pass.cache import TwoStreamCache
from mole.mixtures.two_pass.joint_cache import JointCache
from mole.mixtures.two_pass.routing_pass import constant_frame
from mole.routing import Frame, Routing, RoutingInputs

if TYPE_CHECKING:
    from mole.mixtures.model import MultiExpertModel


@dataclass
class SpeculationReport:
    """How one `generate` call went. `tokens` are decode steps, each one token per sequence, after the first token.

    `drafts` and `accepted` count the guesses that were checked and those that were right, over all sequences;
    `reads` the forwards that read the weights.
    """

    tokens: int = 0
    drafts: int = 0
    accepted: int = 0
    reads: int = 0

    def count(self, right: Tensor, drafted: Tensor) -> None:
        """One more step: which sequences (bool [B]) had a draft, and whose was right."""
        self.tokens += 1
        self.drafts += int(drafted.sum())
        self.accepted += int(right.sum())

    @property
    def acceptance(self) -> float:
        """Share of drafts that were right."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def reads_per_token(self) -> float:
        """Reads of the weights for each token of a sequence; 2 without speculation."""
        return self.reads / self.tokens if self.tokens else 0.0


@dataclass
class _Drafts:
    """What pass 1 of the newest token gave: its routings, by site, and scores [B, V] of the token after it.

    `latest` is what the router says of itself after that pass, where it says anything: a tuple of tensors [B, …].
    """

    routings: tuple[Routing, ...]
    scores: Tensor
    latest: Any


@dataclass
class _Decoding:
    """The state of one call: both streams as one batch, the mask of their slots, where the newest token stands."""

    model: MultiExpertModel
    joint: JointCache
    mask: Tensor  # [2B, slots]
    positions: Tensor  # [B, 1]
    report: SpeculationReport

    def both_passes(self, token: Tensor, draft: Tensor, routings: tuple[Routing, ...]) -> tuple[Tensor, _Drafts]:
        """Pass 2 of `token` [B] and pass 1 of `draft` [B] → scores after `token` [B, V], what pass 1 gave."""
        model, rows = self.model, len(token)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        frame = Frame(routings=_with_pass_one(model, routings, rows), generating=True)
        positions = torch.cat([self.positions, self.positions + 1])
        inputs = _inputs(model, torch.cat([token, draft]), positions, self.mask, self.joint)
        with model.context.push(frame), _last_hidden(model) as hidden:
            scores = model.backbone(**inputs).logits[:, -1].float()
        self.report.reads += 1
        self.positions = self.positions + 1
        return scores[:rows], _Drafts(_routed(model, hidden[-1][rows:]), scores[rows:], _latest(model))

    def redo(self, token: Tensor, wrong: Tensor, drafts: _Drafts) -> _Drafts:
        """Pass 1 again, for the rows whose draft was `wrong` (bool [B]), with the right `token` [B] of each."""
        everything = bool(wrong.all())
        rows = slice(len(token), None) if everything else wrong.nonzero()[:, 0] + len(token)
        self.joint.rewrite(rows)
        try:
            again = _pass_one(self.model, token[wrong], self.positions[wrong], self.mask[rows], self.joint)
        finally:
            self.joint.rewrite(None)
        self.report.reads += 1
        if everything:
            return again
        scores = drafts.scores.clone()
        scores[wrong] = again.scores
        made: dict[int, Routing] = {}
        for old, new in zip(drafts.routings, again.routings, strict=True):
            if id(old) not in made:
                made[id(old)] = _replaced(old, new, wrong)
        latest = (
            None
            if again.latest is None
            else type(again.latest)(
                *(_merged(old, new, wrong) for old, new in zip(drafts.latest, again.latest, strict=True))
            )
        )
        return _Drafts(tuple(made[id(old)] for old in drafts.routings), scores, latest)


def require_routing_pass(model: MultiExpertModel) -> None:
    """Raises ValueError unless self-speculation has what it needs: a routing pass of a decoder, in force now."""
    frame = model.context.current or Frame()
    router = frame.router or model.router
    if router is None or "hidden_states" not in router.needs or frame.fixed is not None or not frame.experts_enabled:
        raise ValueError(
            "self_speculation drafts with the routing pass, and this call has none: leave it out, or route by X-LoRA"
        )
    if frame.router is not None:
        raise ValueError("self_speculation works with the model's own router: leave it out inside routed_by")
    if router.gate_refresh > 1 or router.gate_freeze_after is not None:
        raise ValueError("self_speculation is exact: set gate_refresh=1 and gate_freeze_after=null, or leave it out")
    if model.config.is_encoder_decoder:
        raise ValueError("self_speculation is for decoder-only models: leave it out")


def speculate(
    model: MultiExpertModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding method for transformers' `generate` (its argument `custom_generate`), greedy or sampling.

    `input_ids` [B, T] → [B, T + new]. Leaves a `SpeculationReport` in `model.speculation`.
    """
    if generation_config.num_beams > 1 or not model_kwargs.get("use_cache", True):
        raise ValueError(
            "self_speculation is for greedy decoding and sampling with a cache: set num_beams=1, use_cache"
        )
    pad, sample = generation_config._pad_token_tensor, generation_config.do_sample
    has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    keeps = generation_config.return_dict_in_generate and generation_config.output_scores
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    first = model._prefill(input_ids, generation_config, model_kwargs)  # type: ignore[attr-defined]
    scores, kept = first.logits[:, -1].float(), ()
    state: _Decoding | None = None
    drafts: _Drafts | None = None
    guess: tuple[Tensor, Tensor | None] | None = None
    while True:
        processed = logits_processor(input_ids, scores)
        kept += (processed,) if keeps else ()
        token, right = _choose(processed, guess, sample)
        if has_end:
            token, right = torch.where(unfinished, token, pad), right | ~unfinished  # their guess was the padding
        if state is not None:
            state.report.count(right & unfinished, unfinished)
        input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, kept).bool()
        if not unfinished.any():
            break
        if state is None or drafts is None:
            state, drafts = _begin(model, first.past_key_values, token, model_kwargs.get("attention_mask"))
        elif not bool(right.all()):
            drafts = state.redo(token, ~right, drafts)
        draft, odds = _guess(logits_processor(input_ids, drafts.scores), sample)
        guess = (torch.where(unfinished, draft, pad) if has_end else draft, odds)
        scores, ahead = state.both_passes(token, guess[0], drafts.routings)
        _tell(model, drafts, token)
        drafts = ahead
    if streamer is not None:
        streamer.end()
    model.speculation = SpeculationReport() if state is None else state.report
    if not generation_config.return_dict_in_generate:
        return input_ids
    cache = first.past_key_values if state is None else state.joint.pair()
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=kept or None, past_key_values=cache)  # type: ignore[arg-type]


def _begin(
    model: MultiExpertModel, pair: TwoStreamCache, token: Tensor, mask: Tensor | None
) -> tuple[_Decoding, _Drafts]:
    """Pass 1 of the first new token `token` [B], after which the routing pass is one token ahead."""
    length, rows = pair.get_seq_length(), len(token)
    seen = torch.ones(rows, length, dtype=torch.long, device=token.device) if mask is None else mask[:, :length]
    one = seen.new_ones(rows, 1)
    positions, ahead = seen.sum(-1, keepdim=True), torch.cat([seen, one], dim=1)
    drafts = _pass_one(model, token, positions, ahead, pair.scaling)
    behind = torch.cat([torch.zeros_like(one), seen], dim=1)
    state = _Decoding(model, JointCache(pair), torch.cat([behind, ahead]), positions, SpeculationReport(reads=1))
    return state, drafts


def _pass_one(model: MultiExpertModel, token: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> _Drafts:
    """Pass 1 of `token` [B], with the head."""
    assert model.router is not None
    frame = replace(constant_frame(model, model.router), generating=True)
    with model.context.push(frame), _last_hidden(model) as hidden:
        scores = model.backbone(**_inputs(model, token, positions, mask, cache)).logits[:, -1].float()
    return _Drafts(_routed(model, hidden[-1]), scores, _latest(model))


def _inputs(model: MultiExpertModel, token: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> dict[str, Any]:
    inputs = {"input_ids": token[:, None], "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    return inputs | ({"position_ids": positions} if "position_ids" in model.takes else {})


def _routed(model: MultiExpertModel, hidden: Tensor) -> tuple[Routing, ...]:
    """The router on the last hidden states [B, 1, H] → a routing for each site."""
    assert model.router is not None
    outer = model.context.current
    given = RoutingInputs(hidden_states=hidden).over(outer.inputs if outer else None)
    routed = model.router(None, Frame(inputs=given, generating=True))
    return routed if isinstance(routed, tuple) else (routed,) * len(model.sites)


def _choose(scores: Tensor, guess: tuple[Tensor, Tensor | None] | None, sample: bool) -> tuple[Tensor, Tensor]:
    """The next token [B] from processed scores [B, V], and whether it is what was guessed (bool [B])."""
    if not sample:
        token = scores.argmax(-1)
        return token, torch.ones_like(token, dtype=torch.bool) if guess is None else token == guess[0]
    target = torch.softmax(scores, dim=-1)
    if guess is None:
        token = torch.multinomial(target, 1)[:, 0]
        return token, torch.ones_like(token, dtype=torch.bool)
    draft, odds = guess
    assert odds is not None
    share = target.gather(1, draft[:, None])[:, 0] / odds.gather(1, draft[:, None])[:, 0]
    right = torch.rand_like(share) < share
    rest = (target - odds).clamp_min(0.0)
    # Where both distributions are the same there is nothing left to draw from, and nothing is rejected either.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
    return torch.where(right, draft, torch.multinomial(rest, 1)[:, 0]), right


def _guess(scores: Tensor, sample: bool) -> tuple[Tensor, Tensor | None]:
    """A token [B] from the backbone's processed scores [B, V], and the distribution that it was drawn from."""
    if not sample:
        return scores.argmax(-1), None
    odds = torch.softmax(scores, dim=-1)
    return torch.multinomial(odds, 1)[:, 0], odds


def _with_pass_one(model: MultiExpertModel, routings: tuple[Routing, ...], rows: int) -> dict[str, Routing]:
    """By site: the routing of B rows, then the constant routing of pass 1 for B more; shared objects stay shared."""
    assert model.router is not None
    constant = model.router.routing_pass_weights()
    made: dict[int, Routing] = {}
    for routing in routings:
        if id(routing) not in made:
            dense = routing.dense(model.shape.num_experts).expand(rows, -1, -1)
            other = torch.zeros_like(dense) if constant is None else constant.weights.to(dense).expand_as(dense)
            made[id(routing)] = Routing(torch.cat([dense, other]))
    return {site: made[id(routing)] for site, routing in zip(model.sites, routings, strict=True)}


def _replaced(old: Routing, new: Routing, rows: Tensor) -> Routing:
    """`old` [B, 1, K] with `new` in `rows` (bool [B])."""
    return Routing(
        _merged(old.weights, new.weights, rows),  # type: ignore[arg-type]
        _merged(old.expert_ids, new.expert_ids, rows),
        predicted=_merged(old.predicted, new.predicted, rows),
    )


def _merged(old: Tensor | None, new: Tensor | None, rows: Tensor) -> Tensor | None:
    if old is None or new is None:
        return None
    old = old.clone()
    old[rows] = new
    return old


def _latest(model: MultiExpertModel) -> Any:
    return getattr(model.router, "latest", None)


def _tell(model: MultiExpertModel, drafts: _Drafts, token: Tensor) -> None:
    """Tells the router and the listeners of the routing of `token` [B], as an ordinary decode step does."""
    if drafts.latest is not None:
        model.router.latest = drafts.latest  # type: ignore[union-attr]  by now the router has seen the next draft
    if model.listeners:
        outer = model.context.current
        inputs = RoutingInputs(input_ids=token[:, None]).over(outer.inputs if outer else None)
        frame = Frame(
            inputs=replace(inputs, attention_mask=None), seen=dict(zip(model.sites, drafts.routings, strict=True))
        )
        model.report(frame, "decode")


@contextmanager
def _last_hidden(model: MultiExpertModel) -> Iterator[list[Tensor]]:
    """The last hidden state [B, 1, H] of the forward in the body, as the routing pass sees it, at the end of the list.

    A head calls the inner model, or (OPT's) the inner model's decoder itself. Raises ValueError where it calls neither.
    """
    found: list[Tensor] = []
    inner = model.backbone.base_model
    parts = [inner, getattr(inner, "decoder", None)]
    handles = [
        part.register_forward_hook(lambda module, inputs, output: found.append(output.last_hidden_state))
        for part in parts
        if isinstance(part, nn.Module) and not isinstance(part, nn.ModuleList)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"self_speculation: a {type(model.backbone).__name__} shows no last hidden state of its inner model: "
            "generate without it"
        )
