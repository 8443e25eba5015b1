"""MoEfy's flat arguments, and the fields of MoEConfig and its router by their own names, as one configuration.

Everything that is wrong is gathered and raised as one ValueError that gives the field, its value and what is valid.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from mole.moe.config import COEFFICIENT, CapacityConfig, MoEConfig, MoERouterConfig
from mole.registry import unknown

Config = TypeVar("Config", MoEConfig, MoERouterConfig)

_NOISES = ("gumbel", "simple", "gaussian", "normal", "jitter", "learned")
_CRITERIA: dict[Any, dict[str, float]] = {
    None: {},
    "entropy": {"balance_entropy": COEFFICIENT},
    "load_balance": {"load_balance": COEFFICIENT},
}
_OWN = ("expert_choice", "hole", "noise", "aux_criterion")
_TOP = tuple(f.name for f in fields(MoEConfig) if f.name not in ("name", "router", "capacity"))
_ROUTER = tuple(f.name for f in fields(MoERouterConfig) if f.name not in ("name", "noise", "seed"))
_NESTED = ("router", "capacity", *(f.name for f in fields(CapacityConfig)))


def from_flat(given: dict[str, Any], experts: int | None = None) -> MoEConfig:
    """The configuration that flat arguments mean, for as many `experts` as their list has, if that is known.

    Raises ValueError for an argument, criterion or noise that is not known, and for what cannot go together.
    """
    found = _unknown(given)
    top = {name: given[name] for name in _TOP if name in given}
    router = {name: given[name] for name in _ROUTER if name in given}
    if given.get("expert_choice"):
        router["name"] = "expert_choice"
    if given.get("hole"):
        if "null_experts" in given:
            found.append("hole=True and null_experts are both given: hole is null_experts=('zero',), give one of them")
        top["null_experts"] = ("zero",)
    if "noise" in given:
        if given["noise"] is not None and given["noise"] not in _NOISES:
            found.append(unknown("noise", str(given["noise"]), _NOISES))
        else:
            router["noise"] = "learned" if given["noise"] == "gaussian" else given["noise"]
    if "aux_criterion" in given:
        found += _criterion(given, router)
    if not found:
        try:
            return MoEConfig(**top, router=MoERouterConfig(**router))
        except ValidationError:
            pass
    raise ValueError("; ".join(dict.fromkeys([*found, *_gathered(top, router, experts)])))


def changed(config: MoEConfig, **changes: Any) -> MoEConfig:
    """The configuration with other fields. Raises ValueError in plain words for what cannot go together."""
    try:
        return replace(config, **changes)
    except ValidationError as error:
        raise ValueError("; ".join(_told(error))) from None


def _unknown(given: dict[str, Any]) -> list[str]:
    """A line for each argument that no block has, or that only a whole configuration sets."""
    known = [*_OWN, *_TOP, *_ROUTER]
    found = []
    for name in given:
        if name in _NESTED:
            found.append(f"{name}: give a whole MoEConfig as config, which has router and capacity")
        elif name not in known:
            found.append(unknown("option", name, known))
    return found


def _criterion(given: dict[str, Any], router: dict[str, Any]) -> list[str]:
    """Puts the losses of MoEfy's criterion into `router`; a line for what is wrong with it."""
    criterion = given["aux_criterion"]
    if "losses" in router:
        return ["aux_criterion and losses are both given: a criterion stands for losses, give one of them"]
    if criterion == "prob":
        if router.get("noise", "learned") not in ("learned", "normal"):
            return [f"aux_criterion='prob' needs noise='gaussian' or 'normal', got {given['noise']!r}"]
        return []
    if criterion not in _CRITERIA:
        return [unknown("aux_criterion", str(criterion), ["None", "prob", *filter(None, _CRITERIA)])]
    router["losses"] = dict(_CRITERIA[criterion])
    return []


def _gathered(top: dict[str, Any], router: dict[str, Any], experts: int | None) -> list[str]:
    """Everything that is wrong with these fields, for as many experts as are known."""
    if experts is not None:
        top = {"num_experts": experts, **top}
    router_config, wrong = _tried(MoERouterConfig, router)
    whole = top if router_config is None else {**top, "router": router_config}
    return [*wrong, *_tried(MoEConfig, whole)[1]]


def _tried(kind: type[Config], given: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration without the fields whose values no field can have, and a line for each problem."""
    try:
        return kind(**given), []
    except ValidationError as error:
        lines = _told(error)
        wrong = {row["loc"][0] for row in error.errors() if row["loc"] and row["loc"][0] in given}
    if not wrong:
        return None, lines
    rest, more = _tried(kind, {name: value for name, value in given.items() if name not in wrong})
    return rest, [*lines, *more]


def _told(error: ValidationError) -> list[str]:
    """What pydantic found, in our words: a line for each field."""
    lines = []
    for row in error.errors(include_url=False):
        if row["type"] == "value_error":
            lines.append(str(row.get("ctx", {}).get("error", row["msg"])))
        else:
            valid = row["msg"].replace("Input should be", "valid is").replace("Input should", "it should")
            lines.append(f"{'.'.join(map(str, row['loc']))}={row['input']!r}: {valid}")
    return list(dict.fromkeys(lines))
