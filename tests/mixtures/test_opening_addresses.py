"""What `model=` may be: a library at an address stands for all its experts, an expert in it for itself."""

import pytest

from mole.adapters import Adapter, LoraWeights
from mole.backbones import TinyConfig, load
from mole.experts import BackboneRef, Expert, ExpertLibrary, LibraryError, describe
from mole.mixtures import open_model


@pytest.fixture
def backbone():
    return load(TinyConfig(device="cpu"))


def test_a_library_in_memory_opens_as_all_its_experts_and_one_of_them_as_itself(backbone, request):
    pytest.importorskip("obstore")
    import torch

    address = f"memory://{request.node.name}"
    library = ExpertLibrary.open(address)
    path, module = next((n, m) for n, m in backbone.model.named_modules() if n.endswith("q_proj"))
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        part = LoraWeights(
            A=torch.randn(2, module.in_features, generator=generator),
            B=torch.randn(module.out_features, 2, generator=generator),
            alpha=2.0,
        )
        adapter = Adapter("lora", {path: part})
        card = describe(adapter, BackboneRef(backbone.name, shapes=backbone.shapes), tasks=[name])
        library.add_expert(Expert(card, adapter), name)
    assert open_model(address, backbone).expert_names == ("one", "two")
    assert open_model(f"{address}/two", load(TinyConfig(device="cpu"))).expert_names == ("two",)


def test_an_address_without_a_library_is_told(backbone):
    pytest.importorskip("obstore")
    with pytest.raises(LibraryError):
        open_model("memory://nothing-here", backbone)
