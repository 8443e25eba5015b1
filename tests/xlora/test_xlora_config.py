"""xLoRAConfig: what it takes, by place and by name, and one error for each thing that it refuses."""

import copy

import peft
import pytest
import torch
from omegaconf import OmegaConf
from xlora_cases import build

from mole.xlora import XLoraConfig, xLoRAConfig

BAD = [
    ("hidden_size", 0),
    ("hidden_size", 4096.0),
    ("base_model_id", ""),
    ("device", "abacus"),
    ("adapters", {}),
    ("adapters", []),
    ("adapters", {"": "x"}),
    ("adapters", {"a": ""}),
    ("adapters", {1: "x"}),
    ("adapters", ["a", "a"]),
    ("enable_softmax", 1),
    ("softmax_temperature", 0.0),
    ("softmax_temperature", float("inf")),
    ("softmax_temperature", True),
    ("top_k_lora", 0),
    ("top_k_lora", True),
    ("enable_softmax_topk", None),
    ("layerwise_scalings", "yes"),
    ("xlora_depth", 0),
    ("xlora_size", -1),
    ("enable_relu_and_dropout", 0),
    ("use_bias", None),
    ("xlora_dropout_p", 1.0),
    ("xlora_dropout_p", -0.1),
    ("use_trainable_adapters", "no"),
    ("scaling_pass_value", float("nan")),
    ("scaling_pass_value", False),
    ("global_scaling_weight", None),
    ("stop_token_id", "2"),
    ("router_dtype", "bfloat16"),
    ("scaling_pass_topk", 2),
    ("scaling_pass_dropout", None),
    ("expert_dropout", "on"),
    ("expert_dtype", "int8"),
    ("kernel", "fast"),
    ("modules_to_save", "take:"),
    ("modules_to_save", "train:"),
    ("modules_to_save", "all"),
    ("pooled_gate", "median"),
    ("gate_lora_bias", 1),
    ("gate_refresh", 0),
    ("gate_freeze_after", 0),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: repr(v) if not isinstance(v, str) else v)
def test_a_bad_value_is_refused_with_field_value_need_and_remedy(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got .*, need .*; \w+"):
        xLoRAConfig(**{field: value})


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)xlora_depth: got 0.*xlora_size: got 0"):
        xLoRAConfig(xlora_depth=0, xlora_size=0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"enable_softmax_topk": True, "enable_softmax": False}, "top_k_lora to be set"),
        ({"enable_softmax_topk": True, "top_k_lora": 1}, "enable_softmax to be False"),
    ],
)
def test_softmaxes_that_contradict_each_other_are_refused(fields, says):
    with pytest.raises(ValueError, match=f"enable_softmax_topk: got True, need {says}"):
        xLoRAConfig(**fields)


def test_arguments_by_place_are_told_apart_by_type():
    config = xLoRAConfig(32, "org/base", torch.device("cpu"), {"a": "x"})
    assert (config.hidden_size, config.base_model_id, config.device) == (32, "org/base", torch.device("cpu"))
    other = xLoRAConfig(32, "cpu", {"a": "x"}, "org/base")
    assert (other.device, other.adapters, other.base_model_id) == ("cpu", {"a": "x"}, "org/base")
    with pytest.raises(TypeError, match="base_model_id was given twice"):
        xLoRAConfig(32, "org/base", "org/other")
    with pytest.raises(TypeError, match="argument 2 is a float"):
        xLoRAConfig(32, 0.5)


def test_defaults_are_those_of_the_method():
    config = xLoRAConfig()
    assert (config.xlora_depth, config.xlora_size, config.xlora_dropout_p, config.softmax_temperature) == (
        1,
        2048,
        0.2,
        1,
    )
    assert config.enable_softmax
    assert config.enable_relu_and_dropout
    assert config.use_bias
    assert (config.scaling_pass_value, config.global_scaling_weight, config.top_k_lora) == (0.0, 1.0, None)
    assert XLoraConfig is xLoRAConfig


def test_whole_numbers_are_floats_where_floats_are_wanted():
    config = xLoRAConfig(softmax_temperature=2, global_scaling_weight=1)
    assert type(config.softmax_temperature) is float
    assert type(config.global_scaling_weight) is float


def test_unknown_fields_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="xlora_dept: no such field of xLoRAConfig; did you mean xlora_depth"):
        xLoRAConfig(xlora_dept=2)
    with pytest.raises(AttributeError, match="did you mean top_k_lora"):
        xLoRAConfig().top_k_lor = 2


def test_a_hydra_node_is_taken_with_its_order():
    node = OmegaConf.create({"xlora_depth": 2, "adapters": {"law": "experts/law", "code": "experts/code", "bio": "x"}})
    config = xLoRAConfig.of(node)
    assert type(config.adapters) is dict
    assert list(config.adapters) == ["law", "code", "bio"]
    assert type(xLoRAConfig(adapters=node.adapters).adapters) is dict


def test_pefts_config_is_converted():
    theirs = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"0": "a", "1": "b"}, xlora_depth=3, top_k_lora=1,
        base_model_name_or_path="org/base",
    )  # fmt: skip
    config = xLoRAConfig.of(theirs)
    assert (config.hidden_size, config.xlora_depth, config.top_k_lora) == (32, 3, 1)
    assert config.adapters == {"0": "a", "1": "b"}
    assert (config.base_model_id, config.task_type) == ("org/base", "CAUSAL_LM")
    theirs._subfolders = ["s", None]
    assert xLoRAConfig.of(theirs).adapters == {"0": ("a", "s"), "1": "b"}
    with pytest.raises(ValueError, match="need an xLoRAConfig"):
        xLoRAConfig.of(3)


def test_pefts_common_fields_are_accepted():
    config = xLoRAConfig(
        peft_type="XLORA", inference_mode=True, revision=None, auto_mapping=None, peft_version="0.19.1"
    )
    assert config == xLoRAConfig()


def test_a_copy_is_equal_and_its_own():
    config = xLoRAConfig(adapters={"a": "x"})
    other = copy.deepcopy(config)
    other.adapters["a"] = "y"
    assert config.adapters == {"a": "x"}


# ---- against the model
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"top_k_lora": 4}, "top_k_lora: got 4, need at most the number of experts, 3"),
        ({"hidden_size": 64}, "hidden_size: got 64, need the model's, 32"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_build(fields, says, folders):
    with pytest.raises(ValueError, match=says):
        build(folders, **fields)


@pytest.mark.parametrize("field", ["xlora_depth", "layerwise_scalings", "use_bias", "hidden_size", "kernel"])
def test_a_field_assigned_after_the_build_that_is_built_in_is_refused_at_the_next_forward(field, model, tmp_path):
    other = {"xlora_depth": 3, "layerwise_scalings": False, "use_bias": False, "hidden_size": None, "kernel": "loop"}
    before = getattr(model.xlora_config, field)
    setattr(model.xlora_config, field, other[field])
    for act in (lambda: model(torch.tensor([[3]])), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(ValueError, match=f"{field}: got {other[field]!r}, need {before!r}, with which"):
            act()
    setattr(model.xlora_config, field, before)
    model(torch.tensor([[3]]))


def test_an_invalid_field_assigned_later_is_refused_at_the_next_forward(model):
    model.xlora_config.softmax_temperature = -1.0
    with pytest.raises(ValueError, match="softmax_temperature: got -1.0"):
        model(torch.tensor([[3]]))


def test_a_field_assigned_later_acts(model):
    model(torch.tensor([[3, 4]]))
    before = model.get_latest_scalings()
    model.xlora_config.softmax_temperature = 0.1
    model(torch.tensor([[3, 4]]))
    assert not torch.allclose(model.get_latest_scalings(), before)


def test_an_empty_base_model_of_peft_s_is_none():
    assert xLoRAConfig(base_model_name_or_path="").base_model_id is None
    assert xLoRAConfig(base_model_name_or_path="org/base").base_model_id == "org/base"
