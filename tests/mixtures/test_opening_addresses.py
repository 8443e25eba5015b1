"""What `model=` may be: a library at an address stands for all its experts, an expert in it for itself."""

import pytest

import mole
from mole.adapters import Adapter, LoraWeights
from mole.backbones import TinyConfig, load
from mole.experts import BackboneRef, Expert, ExpertLibrary, LibraryError, describe
from mole.mixtures import open_model, save_mixture


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


@pytest.fixture
def library(backbone, tmp_path):
    """Three experts in a folder."""
    import torch

    library = ExpertLibrary.open(str(tmp_path / "lib"))
    path, module = next((n, m) for n, m in backbone.model.named_modules() if n.endswith("q_proj"))
    for seed, name in enumerate(("one", "two", "three")):
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(2, module.in_features, generator=generator), torch.randn(module.out_features, 2)
        adapter = Adapter("lora", {path: LoraWeights(A=A, B=B, alpha=2.0)})
        card = describe(adapter, BackboneRef(backbone.name, shapes=backbone.shapes), tasks=[name], tags=[name])
        library.add_expert(Expert(card, adapter), name)
    return library


def test_a_mixture_is_made_of_a_library_and_grows_by_another(library, backbone):
    model = mole.from_library(library, backbone, "static", where={"tags": ["one", "two"]})
    assert (model.expert_names, model.router_config.name) == (("one", "two"), "static")
    with pytest.raises(LibraryError, match="one, two: in the mixture already"):
        mole.add_experts_from_library(model, library)
    grown = mole.add_experts_from_library(model, library.url, {"names": "three"}, backbone=backbone)
    assert grown.expert_names == ("one", "two", "three")
    grown.unload()
    assert mole.from_library(library.url, backbone, names=["three", "one"]).expert_names == ("three", "one")


def test_a_mixture_in_a_library_opens_by_its_address_and_is_no_expert(library, backbone, tmp_path):
    model = mole.from_library(library, backbone)
    save_mixture(model, tmp_path / "lib" / "all", backbone)
    model.unload()
    with pytest.raises(LibraryError, match=r"/lib/all is a mixture, not an adapter: open it with mole\.from_library"):
        _ = library.get_expert("all").adapter
    assert mole.from_library(f"{library.url}/all", backbone).expert_names == ("one", "three", "two")


def test_an_address_without_a_library_is_told(backbone):
    pytest.importorskip("obstore")
    with pytest.raises(LibraryError):
        open_model("memory://nothing-here", backbone)
