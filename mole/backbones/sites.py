"""Sites: the places in a backbone where a sub-layer ends, and the norms. What differs between families is one table.

h is what a sub-layer computes (after its dropout), x the residual that is added to it, LN the norm that closes it.

output  LN(h + x) in one module with the parts dense, dropout and LayerNorm (post-norm)
split   LN(h + x) in the block's own forward: the norm is given the sum alone, so x and h are taken where they pass
linear  h + x, h the last linear map's: nothing closes it (pre-norm, parallel residuals)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from mole.registry import nearest, unknown

Kind = Literal["output", "linear", "split"]
PARTS = ("attention", "ffn")


class Place(NamedTuple):
    """Where one kind of sub-layer is, in its block: `end` the module of the site, output module or last linear map.

    Of a split one: `norm` closes it, x is the input of `reads`, h the output of `gives`.
    """

    kind: Kind
    end: str
    norm: str = ""
    reads: str = ""
    gives: str = ""


@dataclass(frozen=True)
class Site:
    """One place: `path` of its module, `layer` its block from 0.

    `norm` what closes it (output, split); `whole` the sub-layer's module, which reads its input (linear). Of a split
    one `path` is the last linear map, by which experts name the site; x is the first input of the module `reads`, h the
    output of `gives`, or the first of several.
    """

    path: str
    kind: Kind
    part: str
    layer: int
    norm: str | None = None
    whole: str | None = None
    reads: str = ""
    gives: str = ""


def _linear(attention: str, ffn: str) -> dict[str, Place]:
    return {"attention": Place("linear", attention), "ffn": Place("linear", ffn)}


_OUTPUT = {"attention": Place("output", "attention.output"), "ffn": Place("output", "output")}
_GATED = _linear("self_attn.o_proj", "mlp.down_proj")
FAMILIES: dict[str, dict[str, Place]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), _OUTPUT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _GATED),
    "gpt2": _linear("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": _linear("attention.dense", "mlp.dense_4h_to_h"),
    "phi": _linear("self_attn.dense", "mlp.fc2"),
    "modernbert": _linear("attn.Wo", "mlp.Wo"),
    "vit": _linear("attention.o_proj", "mlp.fc2"),
    "distilbert": {
        "attention": Place("split", "attention.out_lin", "sa_layer_norm", "attention", "attention"),
        "ffn": Place("split", "ffn.lin2", "output_layer_norm", "ffn", "ffn"),
    },
    "mpnet": {
        "attention": Place("split", "attention.attn.o", "attention.LayerNorm", "attention.attn", "attention.dropout"),
        "ffn": _OUTPUT["ffn"],
    },
}
_OUTPUT_PARTS = ("dense", "dropout", "LayerNorm")
_JOINED = ("norm", "reads", "gives")


def model_type(model: Any) -> str:
    """The family of the text part of a backbone, as transformers calls it."""
    return str(model.config.get_text_config().model_type)


def sites_of(model: Any, override: Mapping[str, str] | None = None) -> list[Site]:
    """The sites in execution order: block by block, attention before feed-forward.

    `override` gives regular expressions for the whole paths, `attention` and `ffn`, and `kind` (output or linear), in
    the place of the table. Raises ValueError for a family that the table lacks, an expression that matches nothing, and
    an output module without its parts.
    """
    found = _by_expression(model, override) if override else _by_family(model)
    modules = dict(model.named_modules())
    for site in found:
        if site.kind == "output":
            parts = [name for name in _OUTPUT_PARTS if not hasattr(modules[site.path], name)]
            if parts:
                raise ValueError(f"{site.path} has no {', '.join(parts)}: it is no output module of a post-norm block")
    return found


def _by_family(model: Any) -> list[Site]:
    kind = model_type(model)
    if kind not in FAMILIES:
        raise ValueError(
            f"where the sub-layers of a {kind} end is not known: {unknown('model_type', kind, FAMILIES)}; say it with "
            "adapter.sites={attention: <regex>, ffn: <regex>, kind: linear}"
        )
    found = _in_table(model, FAMILIES[kind])
    if not found:
        raise ValueError(f"a {type(model).__name__} has none of the modules that a {kind} ends its sub-layers with")
    return sorted(found, key=_order)


def _in_table(model: Any, family: Mapping[str, Place]) -> list[Site]:
    found = []
    for part, place in family.items():
        pattern = re.compile(rf"((?:.+\.)?(?:layers?|h)\.(\d+)\.){re.escape(place.end)}", re.ASCII)
        for path, _ in model.named_modules():
            if (match := pattern.fullmatch(path)) is None:
                continue
            layer, names = int(match[2]), {name: f"{match[1]}{getattr(place, name)}" for name in _JOINED}
            split = place.kind == "split"
            found.append(Site(path, "split", part, layer, **names) if split else _site(path, place.kind, part, layer))
    return found


def split_sites(model: Any) -> list[Site]:
    """The split sites of a model, in execution order; none of families that have none, or that are not known."""
    family = FAMILIES.get(model_type(model), {}) if hasattr(model, "config") else {}
    places = {part: place for part, place in family.items() if place.kind == "split"}
    return sorted(_in_table(model, places), key=_order)


def split_at(model: Any, module: nn.Module) -> Site | None:
    """The split site of `model` whose last linear map is `module`; None if there is none."""
    return next((site for site in split_sites(model) if model.get_submodule(site.path) is module), None)


def _site(path: str, kind: Kind, part: str, layer: int) -> Site:
    if kind == "output":
        return Site(path, kind, part, layer, norm=f"{path}.LayerNorm")
    return Site(path, kind, part, layer, whole=path.rpartition(".")[0])


def _order(site: Site) -> tuple[int, int]:
    return site.layer, PARTS.index(site.part)


def _by_expression(model: Any, override: Mapping[str, str]) -> list[Site]:
    odd = sorted(set(override) - {*PARTS, "kind"})
    if odd:
        raise ValueError(f"adapter.sites: {unknown('key', odd[0], [*PARTS, 'kind'])}")
    kind = override.get("kind", "linear")
    if kind not in ("output", "linear"):
        raise ValueError(f"adapter.sites: {unknown('kind', kind, ['output', 'linear'])}")
    found, paths = [], [path for path, _ in model.named_modules() if path]
    for part in PARTS:
        if part not in override:
            continue
        matches = [path for path in paths if re.fullmatch(override[part], path)]
        if not matches:
            near = nearest(override[part], paths)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise ValueError(f"adapter.sites: {part}: {override[part]!r} matches no module{hint}")
        for place, path in enumerate(matches):
            number = re.search(r"\.(\d+)\.", f".{path}.")
            found.append(_site(path, kind, part, int(number[1]) if number else place))  # type: ignore[arg-type]
    if not found:
        raise ValueError("adapter.sites names neither attention nor ffn")
    return sorted(found, key=_order)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or an RMSNorm of any make."""
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm) or re.search(r"(RMS|Layer)Norm", type(module).__name__)
    return bool(named) and weight is not None and weight.dim() == 1 and next(module.children(), None) is None


def norms_of(model: Any) -> dict[str, nn.Module]:
    """The norms of the backbone, path → module; those of a head on it are left out."""
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    return {
        path: module
        for path, module in model.named_modules()
        if is_norm(module) and (not prefix or path.startswith(f"{prefix}."))
    }
