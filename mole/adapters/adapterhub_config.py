"""AdapterHub's config of an adapter: the fields that it may have, and what they say in mole's terms.

seq_bn         z = LN(h + x)   original_ln_before   (once pfeiffer)
double_seq_bn  z = h                                (once houlsby)
par_bn         z = x           is_parallel          (once parallel, scaled_parallel)

Each adds s (U φ(D z + b) + c) to h. A field with a value that computes something else is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mole.adapters.bottleneck import ACTIVATIONS
from mole.untrusted import Damaged, Refused, shown

# What stands behind a name in the place of fields.
_NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": {
        "mh_adapter": False,
        "output_adapter": True,
        "non_linearity": "relu",
        "original_ln_before": True,
        "reduction_factor": 16,
    },
    "double_seq_bn": {
        "mh_adapter": True,
        "output_adapter": True,
        "non_linearity": "swish",
        "original_ln_before": False,
        "reduction_factor": 16,
    },
    "par_bn": {
        "mh_adapter": False,
        "output_adapter": True,
        "non_linearity": "relu",
        "is_parallel": True,
        "reduction_factor": 2,
        "scaling": 4.0,
    },
    "lora": {"architecture": "lora"},
}
_OLD = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn", "parallel": "par_bn", "scaled_parallel": "par_bn"}
_ARCHITECTURES = (None, "bottleneck", "lora")
# What a field has to be; the first value is written.
_FIXED: dict[str, tuple[Any, ...]] = {
    "ln_before": (False,),
    "ln_after": (False,),
    "original_ln_before": (False, True),
    "original_ln_after": (True,),
    "residual_before_ln": (True,),
    "adapter_residual_before_ln": (False,),
    "is_parallel": (False, True),
    "use_gating": (False,),
    "phm_layer": (False,),
    "inv_adapter": (None,),
    "cross_adapter": (False,),
    "stochastic_depth": (0.0, 0, None),
    "composition_mode": ("add",),
    "output_lora_only": (False,),
    "vera_d": (None,),
    "vera_b": (None,),
}
_OF_LORA = ("composition_mode", "output_lora_only", "vera_d", "vera_b")
_ELSEWHERE = {  # read where they mean something, or without effect on what is computed
    *("architecture", "init_weights", "init_weights_seed", "init_weights_vera", "dtype", "leave_out"),
    *("reduction_factor", "mh_adapter", "output_adapter", "non_linearity", "scaling", "dropout", "r", "alpha"),
    *("attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "inv_adapter_reduction_factor"),
    *("learn_phm", "phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "factorized_phm_W"),
    *("factorized_phm_rule", "hypercomplex_nonlinearity", "shared_W_phm", "shared_phm_rule"),
}
_OTHER = "it computes something else than h + s (U φ(D z + b) + c)"
_SPELLED = {"leakyrelu": "leaky_relu"}  # theirs → transformers' name
_FLAGS = {"mh_adapter": "attention", "output_adapter": "ffn"}


@dataclass(frozen=True)
class HubConfig:
    """A bottleneck's config.

    `reads` h, normed or x; `parts` the sub-layers that have one; `scale` None: learned; `factor` of the width, a number
    or block → number with default; `leave_out` the blocks without.
    """

    reads: str
    parts: tuple[str, ...]
    activation: str
    scale: float | None
    factor: Any
    leave_out: tuple[int, ...] = ()
    dropout: float = 0.0

    def size(self, layer: int, width: int) -> int | None:
        """How many features it says for block `layer`; None if it does not say."""
        factor = self.factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        return None if factor is None else max(1, int(width // factor))

    def fields(self) -> dict[str, Any]:
        """As AdapterHub writes it."""
        found = {key: values[0] for key, values in _FIXED.items() if key not in _OF_LORA}
        found |= {flag: part in self.parts for flag, part in _FLAGS.items()}
        found |= {"original_ln_before": self.reads == "normed", "is_parallel": self.reads == "x"}
        spelled = "linear" if self.activation == "identity" else self.activation
        found |= {"non_linearity": spelled, "scaling": "learned" if self.scale is None else float(self.scale)}
        found |= {"reduction_factor": self.factor, "leave_out": list(self.leave_out), "dropout": self.dropout}
        return dict(sorted({**found, "init_weights": "bert"}.items()))


def checked(given: Any, what: str) -> dict[str, Any]:
    """The fields of a config, given as such or by a name. Raises Damaged, and Refused for what cannot be followed."""
    if isinstance(given, str):
        name = _OLD.get(given, given)
        if name not in _NAMED:
            raise Refused(f"{what}: config {shown(given)}: mole knows {', '.join([*_NAMED, *_OLD])}")
        given = _NAMED[name]
    if not isinstance(given, dict):
        raise Damaged(f"{what}: config is {shown(given)}")
    if given.get("architecture") not in _ARCHITECTURES:
        raise Refused(f"{what}: architecture {shown(given['architecture'])}: bottlenecks and LoRA are read")
    for key, value in given.items():
        if key in _FIXED:
            # 0 == False and 1 == True, which a config may not mean
            if not any(value == good and type(value) is type(good) for good in _FIXED[key]):
                reason = "only LoRA's sum is read" if key == "composition_mode" else _OTHER
                raise Refused(f"{what}: {key} is {shown(value)}: {reason}")
        elif key not in _ELSEWHERE and value not in (None, False, 0, "", [], {}):
            raise Refused(f"{what}: {key} is set to {shown(value)}: mole does not know how to follow it")
    return given


def bottleneck_config(fields: Mapping[str, Any], what: str) -> HubConfig:
    """What checked fields say of a bottleneck. Raises Refused, naming the field."""
    normed, parallel = fields.get("original_ln_before", False), fields.get("is_parallel", False)
    if normed and parallel:
        raise Refused(
            f"{what}: is_parallel and original_ln_before: what is beside a sub-layer reads no norm at its end"
        )
    for flag in _FLAGS:
        if type(fields.get(flag)) is not bool:
            raise Refused(f"{what}: {flag} is {shown(fields.get(flag))}; true or false is wanted")
    parts = tuple(part for flag, part in _FLAGS.items() if fields[flag])
    if not parts:
        raise Refused(f"{what}: mh_adapter and output_adapter are False: that is no bottleneck at all")
    return HubConfig(
        reads="x" if parallel else "normed" if normed else "h",
        parts=parts,
        activation=_activation(fields.get("non_linearity"), what),
        scale=_scale(fields.get("scaling", 1.0), what),
        factor=_factor(fields.get("reduction_factor"), what),
        leave_out=_blocks(fields.get("leave_out"), what),
        dropout=dropout(fields, what),
    )


def _activation(value: Any, what: str) -> str:
    name = str(value).lower()
    name = _SPELLED.get(name, name)
    if name not in ACTIVATIONS or name == "identity":
        raise Refused(
            f"{what}: non_linearity {shown(value)}; known: {', '.join(sorted(set(ACTIVATIONS) - {'identity'}))}"
        )
    return name


def _scale(value: Any, what: str) -> float | None:
    if value == "learned":
        return None
    if not _above_zero(value):
        raise Refused(f"{what}: scaling is {shown(value)}; a number above 0, and learned, are followed")
    return float(value)


def _above_zero(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e9


def _factor(value: Any, what: str) -> Any:
    good = value is None or _above_zero(value)
    if isinstance(value, dict):
        good = all((key == "default" or key.isdigit()) and _above_zero(factor) for key, factor in value.items())
    if not good:
        raise Refused(f"{what}: reduction_factor is {shown(value)}; a number above 0, or one for each block, is wanted")
    return value


def _blocks(value: Any, what: str) -> tuple[int, ...]:
    if value is not None and not (isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)):
        raise Refused(f"{what}: leave_out is {shown(value)}; numbers of blocks are wanted")
    return tuple(value or ())


def dropout(fields: Mapping[str, Any], what: str) -> float:
    """The rate in the fields. Raises Refused for one that is none."""
    value = fields.get("dropout", 0.0)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise Refused(f"{what}: dropout is {shown(value)}; a number from 0 to below 1 is wanted")
    return float(value)


def factor_for(sizes: Mapping[int, int], width: int) -> Any:
    """The reduction factor that gives these sizes, block → features: a number, or one for each block that differs."""
    ((common, _),) = Counter(sizes.values()).most_common(1)

    def factor(size: int) -> float:
        # ⌊width / factor⌋ has to be the size, however the division rounds
        return float(width // size) if width % size == 0 else width / (size + 0.5)

    if len(set(sizes.values())) == 1:
        return factor(common)
    own = {str(layer): factor(size) for layer, size in sorted(sizes.items()) if size != common}
    return {"default": factor(common), **own}
