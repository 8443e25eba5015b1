"""mole's own files for methods that PEFT has not: what is damaged in them is refused, with what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load, save

from mole.adapters import Adapter, BottleneckWeights, ParallelConfig, attach, extract, files, own_format
from mole.untrusted import Damaged, Refused


@pytest.fixture
def written(llama):
    attach(llama, ParallelConfig(size=3, reduction_factor=None, activation="silu", dropout=0.1), seed=0)
    return files.dump(extract(llama), "user/model")


def test_everything_that_was_written_is_read(written):
    read = files.parse(written, "here")
    assert read.backbone == "user/model"
    assert read.adapter.method == "bottleneck"
    assert read.adapter.dropout == 0.1
    assert read.adapter.targets == ("mlp",)
    part = read.adapter.modules["model.layers.0.mlp"]
    assert (part.activation, part.scale, part.reads, part.rank) == ("silu", 4.0, "input", 3)


def test_the_config_is_told_from_pefts(written):
    assert files.config_name(written["mole_adapter.json"]) == "mole_adapter.json"
    assert files.config_name(b'{"peft_type": "LORA", "method": 1}') == "adapter_config.json"


D = "model.layers.0.mlp.down"
DAMAGES = {
    "no object": (lambda n, t: n.clear(), "not an object with"),
    "another format": (lambda n, t: n.update(format=2), "format 2.*another version of mole"),
    "another method": (lambda n, t: n.update(method="magic"), "method 'magic'|method magic"),
    "dropout": (lambda n, t: n.update(dropout=1.5), "dropout is 1.5"),
    "targets": (lambda n, t: n.update(targets=["(a|a)*"]), "targets is"),
    "no modules": (lambda n, t: n.update(modules={}), "modules is"),
    "a path that climbs": (lambda n, t: n["modules"].update({"../x": {}}), "modules: '../x' is"),
    "a fact too few": (lambda n, t: n["modules"]["model.layers.0.mlp"].pop("scale"), "needs activation"),
    "an unknown activation": (lambda n, t: n["modules"]["model.layers.0.mlp"].update(activation="x"), "activation 'x'"),
    "a scale below 0": (lambda n, t: n["modules"]["model.layers.0.mlp"].update(scale=-1), "scale is"),
    "a missing tensor": (lambda n, t: t.pop(D), "has no tensor down"),
    "another shape": (lambda n, t: t.update({D: torch.ones(2, 16)}), "bottleneck tensors of shapes"),
    "a foreign tensor": (lambda n, t: t.update(x=torch.ones(1)), "belongs to no module"),
    "not finite": (lambda n, t: t[D].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_an_error_that_says_what_is_wrong(name, written):
    change, message = DAMAGES[name]
    node, tensors = json.loads(written["mole_adapter.json"]), load(written["adapter_model.safetensors"])
    change(node, tensors)
    changed = {"mole_adapter.json": json.dumps(node).encode(), "adapter_model.safetensors": save(tensors)}
    with pytest.raises((Damaged, Refused), match=message):
        files.parse(changed, "here")


def test_a_method_without_a_format_cannot_be_written():
    with pytest.raises(ValueError, match="no format for an adapter of method 'gate'"):
        own_format.dump(Adapter("gate", {}), None)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (2,), (4, 3), (4,)),
        ((3, 4), (3,), (4, 2), (4,)),
        ((3, 4), (3,), (4, 3), (5,)),
        ((3,), (3,), (3,), (3,)),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_each_other_are_refused(shapes):
    with pytest.raises(ValueError, match="bottleneck tensors of shapes"):
        BottleneckWeights(*(torch.ones(shape) for shape in shapes))
