"""IA3, prefix and prompt tuning beside PEFT itself: equal logits in both directions, equal bytes; PiSSA as PEFT's."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mole.adapters import (
    Ia3Config,
    PissaConfig,
    PrefixConfig,
    PrefixWeights,
    PromptConfig,
    attach,
    attach_weights,
    extract,
    layers,
    peft_format,
)
from mole.mixtures import MultiExpertModel
from mole.routers import UniformConfig
from mole.untrusted import Damaged, Refused

LM = {"task_type": "CAUSAL_LM"}
CASES = {
    "ia3": (
        "llama",
        peft.IA3Config(**LM, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        Ia3Config(),
    ),
    "ia3 gpt2": (
        "gpt2",
        peft.IA3Config(
            **LM, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
        Ia3Config(),
    ),
    "prefix": ("llama", peft.PrefixTuningConfig(**LM, num_virtual_tokens=5), PrefixConfig(tokens=5)),
    "prompt": ("llama", peft.PromptTuningConfig(**LM, num_virtual_tokens=5), PromptConfig(tokens=5)),
    "prompt gpt2": ("gpt2", peft.PromptTuningConfig(**LM, num_virtual_tokens=4), PromptConfig(tokens=4)),
}


def with_peft(model, config, folder):
    """PEFT's model of that method, every trained number random, saved in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
        made.save_pretrained(folder)
    return made


def peft_logits(model, ids, mask):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(the untouched backbone, PEFT's model, its folder, mole's config)."""
    kind, theirs, ours = CASES[request.param]
    model = request.getfixturevalue(kind)
    folder = tmp_path / "peft"
    return copy.deepcopy(model), with_peft(model, theirs, folder), folder, ours


@pytest.fixture
def mask():
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def close(got, want, mask):
    assert (got - want)[mask.bool()].abs().max() <= 1e-5 * want.abs().max()


def test_a_folder_of_peft_attached_gives_its_logits(case, tokens, mask):
    plain, theirs, folder, _ = case
    want = peft_logits(theirs, tokens, mask)
    assert (plain(tokens, attention_mask=mask).logits - want).abs().max() > 1e-3
    attach_weights(plain, peft_format.read(folder))
    close(plain(tokens, attention_mask=mask).logits, want, mask)


def test_a_folder_of_peft_as_the_one_expert_of_a_mixture_gives_its_logits(case, tokens, mask):
    plain, theirs, folder, _ = case
    want = peft_logits(theirs, tokens, mask)
    model = MultiExpertModel(plain, {"one": peft_format.read(folder)}, UniformConfig()).eval()
    close(model(tokens, attention_mask=mask).logits, want, mask)


def test_peft_generates_what_mole_generates(case, tokens):
    plain, theirs, folder, _ = case
    attach_weights(plain, peft_format.read(folder))
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs.generate(input_ids=tokens, **options)
    assert torch.equal(plain.generate(tokens, **options), want)


def test_written_again_the_tensors_are_those_of_peft_bit_for_bit(case):
    folder = case[2]
    files = peft_format.dump(peft_format.read(folder), "user/model")
    (folder / "again.safetensors").write_bytes(files["adapter_model.safetensors"])
    theirs, ours = load_file(folder / "adapter_model.safetensors"), load_file(folder / "again.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_folder_written_here_loads_in_peft_without_a_warning_and_gives_equal_logits(case, tokens, mask, tmp_path):
    plain, _, _, config = case
    model = copy.deepcopy(plain)
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    peft_format.write(extract(model), tmp_path, "user/model")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    told = [str(w.message) for w in found if "is_gradient_checkpointing" not in str(w.message)]
    assert told == []
    close(model(tokens, attention_mask=mask).logits, peft_logits(loaded, tokens, mask), mask)


def test_pissa_starts_where_peft_starts_and_both_go_the_same_way(llama, tokens):
    theirs_base = copy.deepcopy(llama)
    targets = ["q_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            theirs_base,
            peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="pissa", **LM),
        ).eval()
    attach(llama, PissaConfig(rank=3, alpha=6.0, targets=tuple(targets)), seed=0)
    losses = [[], []]
    for place, model in enumerate((llama, theirs)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=20.0)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses[place].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 1e-3


def test_the_fast_start_of_pissa_finds_the_same_product(llama):
    exact, fast = copy.deepcopy(llama), llama
    attach(exact, PissaConfig(rank=3, targets=("q_proj",)), seed=0)
    attach(fast, PissaConfig(rank=3, targets=("q_proj",), iterations=20), seed=0)
    for one, other in zip(layers(exact).values(), layers(fast).values(), strict=True):
        torch.testing.assert_close(one.B @ one.A, other.B @ other.A, rtol=0, atol=1e-4)


DAMAGES = {
    "ia3: another shape": (
        "ia3",
        lambda t, c: t.update({k: torch.stack([v.flatten()] * 2) for k, v in list(t.items())[:1]}),
        "has shape",
    ),
    "ia3: a foreign tensor": ("ia3", lambda t, c: t.update(x=torch.ones(1)), "belongs to no IA3 factor"),
    "ia3: none": ("ia3", lambda t, c: t.clear(), "no tensor"),
    "ia3: modules that are not there": (
        "ia3",
        lambda t, c: c.update(modules_to_save=["lm_head"]),
        "which are not in it",
    ),
    "ia3: an unknown setting": ("ia3", lambda t, c: c.update(use_magic=True), "does not know how to follow it"),
    "prefix: another number of blocks": ("prefix", lambda t, c: c.update(num_layers=3), "the config says"),
    "prefix: heads that do not divide": ("prefix", lambda t, c: c.update(num_attention_heads=3), "the config says"),
    "prompt: another length": ("prompt", lambda t, c: c.update(num_virtual_tokens=6), "the config says"),
    "prompt: no number": ("prompt", lambda t, c: c.update(num_virtual_tokens="5"), "num_virtual_tokens must be"),
    "prompt: two submodules": ("prompt", lambda t, c: c.update(num_transformer_submodules=2), "num_transformer_sub"),
    "prompt: a foreign tensor": ("prompt", lambda t, c: t.update(x=torch.ones(1)), "is not prompt_embeddings"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_an_error_that_says_what_is_wrong(name, llama, tmp_path):
    kind, change, message = DAMAGES[name]
    with_peft(llama, CASES[kind][1], tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}
    settings = json.loads(config.read_text())
    change(tensors, settings)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, weights)
    config.write_text(json.dumps(settings))
    with pytest.raises((Damaged, Refused), match=message):
        peft_format.read(tmp_path)


def test_prefixes_of_unlike_lengths_have_no_place_in_peft(llama):
    attach(llama, PrefixConfig(tokens=2), seed=0)
    adapter = extract(llama)
    longer = PrefixWeights(torch.ones(3, 1, 8), torch.ones(3, 1, 8), 1)
    with pytest.raises(ValueError, match="other lengths, or of some blocks only"):
        peft_format.dump(type(adapter)("prefix", {**adapter.modules, "1.prefix": longer}), None)
