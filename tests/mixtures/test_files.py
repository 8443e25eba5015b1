"""A saved mixture gives the same logits in a fresh backbone, bit for bit; anything changed in it is refused."""

import json

import pytest
import torch
from mixture_cases import CONFIGS, llama, mixture

from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import Origin, load_mixture, origins_of, save_mixture


def backbone(model=None, name="tests/llama") -> Backbone:
    plain = llama() if model is None else model
    return Backbone(plain, None, name, None, shapes_digest(llama()))


@pytest.fixture
def saved(tmp_path):
    model = mixture("xlora_layerwise")
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    return tmp_path / "mixture"


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_logits_are_equal_bit_for_bit(name, tmp_path, batch):
    model = mixture(name)
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    experts = {f"expert-00{i}.{end}" for i in range(3) for end in ("json", "safetensors")}
    weights = {"router.safetensors"} if list(model.routers()[next(iter(model.routers()))].parameters()) else set()
    assert {p.name for p in (tmp_path / "mixture").iterdir()} == {
        *experts,
        *weights,
        "expert.json",
        "mixture.json",
        "README.md",
    }
    loaded = load_mixture(tmp_path / "mixture", backbone())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert loaded.expert_names == model.expert_names
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trained_experts_are_saved_as_they_are_now(tmp_path, batch):
    model = mixture("uniform", train="experts")
    for name, parameter in model.named_parameters():
        if name.endswith("bank.B"):
            parameter.data.mul_(2.0)
    save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(load_mixture(tmp_path / "mixture", backbone())(**batch).logits, want)
        assert not torch.allclose(mixture("uniform")(**batch).logits, want)


def test_origins_are_kept(tmp_path):
    model = mixture("uniform")
    origin = Origin(name="words", tasks=("spell",), library="lib", revision="a" * 64, content="b" * 64)
    card = save_mixture(model, tmp_path / "mixture", backbone(model.backbone), origins={"words": origin})
    assert origins_of(tmp_path / "mixture")["words"] == origin
    assert [row["name"] for row in card.derived_from] == ["words"]
    assert card.kind == "mixture"


@pytest.mark.parametrize("file", ["router.safetensors", "expert-001.safetensors", "mixture.json", "expert-002.json"])
def test_a_changed_byte_is_refused(saved, file):
    data = bytearray((saved / file).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / file).write_bytes(data)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load_mixture(saved, backbone())


def test_a_missing_file_is_named(saved):
    (saved / "expert-001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expert-001\.safetensors is listed in the card and missing"):
        load_mixture(saved, backbone())


def test_no_folder_no_mixture(tmp_path):
    with pytest.raises(ValueError, match="no mixture in"):
        load_mixture(tmp_path, backbone())


def test_another_backbone_is_refused_with_both_names(saved):
    with pytest.raises(ValueError, match=r"'tests/llama'.*'tests/other'"):
        load_mixture(saved, backbone(name="tests/other"))
    load_mixture(saved, backbone(name="tests/other"), allow_other_backbone=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"router": {"name": "xlor"}}, "router 'xlor' is not known here"),
        ({"router": {"name": "xlora", "_target_": "os.system"}}, "_target_"),
        ({"router": {"name": "xlora", "depth": 0}}, "depth"),
        ({"router": {"name": "uniform"}}, "not this router's"),
        ({"format": 2}, "format 2"),
        ({"extra": 1}, "extra"),
        ({"sites": []}, "mixed modules"),
    ],
)
def test_a_description_that_is_not_one_of_ours_is_refused(saved, change, says):
    """The card is made to fit, so that only the description is wrong."""
    from mole.experts.card import bytes_facts, new_card
    from mole.experts.folder import read_card

    card = read_card(saved)
    data = json.dumps({**json.loads((saved / "mixture.json").read_text()), **change}).encode()
    (saved / "mixture.json").write_bytes(data)
    forged = new_card({**card.files, "mixture.json": bytes_facts(data)}, card.backbone, kind="mixture")
    (saved / "expert.json").write_bytes(forged.to_bytes())
    with pytest.raises(ValueError, match=says):
        load_mixture(saved, backbone())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = mixture("xlora")
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_mixture(model, tmp_path / "mixture", backbone(model.backbone))
    assert list(tmp_path.iterdir()) == []
