"""Adapters in somebody's repository on the Hub: read at one commit, checked, nothing else loaded."""

import json
import warnings

import peft
import pytest
import torch
from hub_fixtures import hub, hub_process, repo_id, with_xet  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from mole.adapters import attach_weights
from mole.experts import Damaged, LibraryError, NoLibrary, Refused
from mole.experts.importing import Hints, import_expert
from mole.experts.repository import parse

# The client's own upload over LFS, with the HTTP library that it brings along.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENS = torch.arange(14).reshape(2, 7)


def make_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **sizes)).eval()


@pytest.fixture
def pushed(hub, repo_id, tmp_path):  # noqa: F811
    """An adapter that peft itself has saved, in a repository of its own; gives its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.save_pretrained(tmp_path / "theirs")
    api().create_repo(repo_id)
    for name in FILES:
        api().upload_file(path_or_fileobj=tmp_path / "theirs" / name, path_in_repo=name, repo_id=repo_id)
    hub.requests.clear()
    return made(TOKENS).logits


def api():
    from huggingface_hub import HfApi

    return HfApi()


def loaded(hub):  # noqa: F811
    """The files that were asked for."""
    return [
        seen.target.partition("?")[0] for seen in hub.requests if "/resolve/" in seen.target and seen.method == "GET"
    ]


def test_what_peft_saved_gives_the_same_logits(pushed, repo_id):  # noqa: F811
    expert = import_expert(f"hf://{repo_id}", hints=Hints(backbone="user/llama"))
    model = make_llama()
    attach_weights(model, expert.adapter)
    torch.testing.assert_close(model(TOKENS).logits, pushed, atol=1e-5, rtol=0)
    (row,) = expert.card.derived_from
    assert row["source"] == f"hf://{repo_id}"
    assert row["revision"] == api().model_info(repo_id).sha


def test_nothing_but_the_two_files_is_loaded(pushed, hub, repo_id):  # noqa: F811
    api().upload_file(path_or_fileobj=b"evil", path_in_repo="training_args.bin", repo_id=repo_id)
    hub.requests.clear()
    import_expert(f"hf://{repo_id}", hints=Hints(backbone="user/llama"))
    assert sorted(path.rsplit("/", 1)[-1] for path in loaded(hub)) == list(FILES)


def test_a_folder_and_a_revision_can_be_named(pushed, repo_id, tmp_path):  # noqa: F811
    first = api().model_info(repo_id).sha
    for name in FILES:
        place = tmp_path / "theirs" / name
        api().upload_file(path_or_fileobj=place, path_in_repo=f"law/v1/{name}", repo_id=repo_id)
    api().delete_file("adapter_model.safetensors", repo_id)
    hints = Hints(backbone="user/llama")
    inside = import_expert(f"hf://{repo_id}/law/v1", hints=hints)
    assert inside.card.derived_from[0]["name"] == "v1"
    assert import_expert(f"hf://{repo_id}@{first}", hints=hints).card.content == inside.card.content
    with pytest.raises(LibraryError, match="no such folder"):
        import_expert(f"hf://{repo_id}/nowhere", hints=hints)
    with pytest.raises(LibraryError, match="no adapter in"):
        import_expert(f"hf://{repo_id}", hints=hints)


def test_a_repository_with_a_pickle_alone_is_refused_unread(hub, repo_id):  # noqa: F811
    api().create_repo(repo_id)
    for name in ("adapter_model.bin", "adapter_config.json"):
        api().upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=repo_id)
    hub.requests.clear()
    with pytest.raises(Refused, match="could run any program"):
        import_expert(f"hf://{repo_id}", hints=Hints(backbone="a"))
    assert loaded(hub) == []


def test_a_repository_that_is_not_there_is_told(hub):  # noqa: F811
    with pytest.raises(NoLibrary):
        import_expert("hf://alice/nowhere")


def test_bytes_that_are_not_those_of_the_listing_are_damage(pushed, repo_id, monkeypatch):  # noqa: F811
    from mole.experts.backends.hub_reading import HubReading

    whole = HubReading.read
    monkeypatch.setattr(HubReading, "read", lambda self, *a: (whole(self, *a)[0].replace(b"2", b"3"), a[0]))
    with pytest.raises(Damaged, match="not what the listing says"):
        import_expert(f"hf://{repo_id}", hints=Hints(backbone="a"))


@pytest.mark.parametrize("place", [*FILES])
def test_a_file_that_says_it_is_huge_is_refused_before_it_is_loaded(pushed, hub, repo_id, monkeypatch, place):  # noqa: F811
    from mole.experts.backends.hub_reading import HubReading

    whole = HubReading.rows

    def rows(self, *args, **kwargs):
        return [row._replace(size=2**40) if row.name == place else row for row in whole(self, *args, **kwargs)]

    monkeypatch.setattr(HubReading, "rows", rows)
    with pytest.raises(Refused, match="at most"):
        import_expert(f"hf://{repo_id}", hints=Hints(backbone="a"))
    assert loaded(hub) == []


@pytest.mark.parametrize(
    "address",
    [
        "hf://a",
        "hf://datasets/a/b",
        "hf://a/b/../c",
        "hf://a/b//c",
        "hf://a/b?token=x",
        "hf://a/b#c",
        "hf://u:p@a/b",
        "hf://a/b@../x",
        "hf://a/b%2e%2e/c",
        "hf://a/b/c\\d",
        f"hf://a/{'b' * 2000}",
    ],
)
def test_what_is_no_folder_of_a_repository_is_told(address):
    with pytest.raises(LibraryError):
        parse(address)


def test_an_address_is_taken_apart():
    assert parse("hf://a/b") == ("a/b", "", None)
    assert parse("hf://a/b/c/d@v1") == ("a/b", "c/d", "v1")
    assert json.dumps(parse("hf://a/b@main")) == '["a/b", "", "main"]'
