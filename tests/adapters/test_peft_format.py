"""PEFT itself is the oracle: what mole writes it loads, what it writes mole loads, with equal logits."""

import copy
import json
import logging
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mole.adapters import Adapter, LoraConfig, LoraWeights, attach, attach_weights, extract, peft_format
from mole.untrusted import Damaged, Refused


def randomize(model):
    """Every B factor random, so that the adapter acts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def load_with_peft(model, folder):
    """PEFT's model, and every warning that was given on the way."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    # PEFT asks transformers for an attribute under its old name: nothing that a folder could cause.
    return loaded, [str(w.message) for w in found if "is_gradient_checkpointing" not in str(w.message)]


def save_with_peft(model, folder, **settings):
    """An adapter made, randomized and saved by PEFT on a copy of `model`; returns the adapted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()
        randomize(made)
        made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=7.0),
        LoraConfig(rank=4, alpha=3.0, rslora=True, dropout=0.1),
        LoraConfig(rank=2, targets=("*.0.*",)),
    ],
    ids=["plain", "rslora", "some modules"],
)
def test_a_folder_written_here_loads_in_peft_with_equal_logits_and_no_warning(
    backbone, tokens, tmp_path, config, caplog
):
    plain = copy.deepcopy(backbone)
    attach(backbone, config, seed=0)
    randomize(backbone)
    peft_format.write(extract(backbone), tmp_path, "user/model")
    with caplog.at_level(logging.WARNING):
        loaded, told = load_with_peft(copy.deepcopy(plain), tmp_path)
    assert told == []
    assert [record.message for record in caplog.records] == []
    torch.testing.assert_close(loaded(tokens).logits, backbone(tokens).logits, atol=1e-6, rtol=0)
    assert not torch.allclose(loaded(tokens).logits, plain(tokens).logits, atol=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def mixed_adapter(llama, *, mixed_scales):
    """Ranks, alphas (and scales) that differ from module to module."""
    modules = {}
    generator = torch.Generator().manual_seed(0)
    for place, path in enumerate(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qko"):
        base = llama.get_submodule(path)
        A = torch.randn(place % 3 + 1, base.in_features, generator=generator)
        B = torch.randn(base.out_features, place % 3 + 1, generator=generator)
        modules[path] = LoraWeights(A=A, B=B, alpha=float(1 + place // 2), rslora=mixed_scales and place % 2 == 0)
    return Adapter("lora", modules)


@pytest.mark.parametrize("mixed_scales", [False, True])
def test_ranks_alphas_and_scales_of_each_module_survive(llama, tokens, tmp_path, mixed_scales):
    adapter = mixed_adapter(llama, mixed_scales=mixed_scales)
    peft_format.write(adapter, tmp_path, None)
    loaded, told = load_with_peft(copy.deepcopy(llama), tmp_path)
    again = peft_format.read(tmp_path)
    attach_weights(llama, adapter)
    assert told == []
    torch.testing.assert_close(loaded(tokens).logits, llama(tokens).logits, atol=1e-6, rtol=0)
    assert {path: w.scale for path, w in again.modules.items()} == pytest.approx(
        {path: w.scale for path, w in adapter.modules.items()}
    )


def test_an_exception_for_one_module_does_not_reach_a_module_whose_path_ends_alike(tmp_path):
    def part(rank, alpha):
        return LoraWeights(A=torch.ones(rank, 4), B=torch.ones(4, rank), alpha=alpha)

    modules = {"q": part(3, 9.0), "x.q": part(1, 1.0), "y.q": part(1, 1.0), "x.x.q": part(2, 5.0)}
    peft_format.write(Adapter("lora", modules), tmp_path, None)
    again = peft_format.read(tmp_path)
    assert {path: (w.rank, w.alpha) for path, w in again.modules.items()} == {
        path: (w.rank, w.alpha) for path, w in modules.items()
    }


SETTINGS = {
    "several targets": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex targets": {"r": 2, "target_modules": r".*\.(q|v)_proj"},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]},
    "rank pattern": {
        "r": 4,
        "rank_pattern": {"v_proj": 2, "1.self_attn.q_proj": 6},
        "target_modules": ["q_proj", "v_proj"],
    },
    "alpha pattern": {
        "r": 4,
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 32, r"1\.self_attn\.v_proj": 5},
        "target_modules": ["q_proj", "v_proj"],
    },
    "rank by regex": {"r": 4, "rank_pattern": {r"layers\.[01]\.mlp\..*": 2}, "target_modules": ["q_proj", "up_proj"]},
    "layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_saved_by_peft_reads_with_equal_logits(llama, tokens, tmp_path, name):
    theirs = save_with_peft(llama, tmp_path, **SETTINGS[name])
    adapter = peft_format.read(tmp_path)
    attach_weights(llama, adapter)
    torch.testing.assert_close(llama(tokens).logits, theirs(tokens).logits, atol=1e-6, rtol=0)


def test_a_gpt2_folder_saved_by_peft_reads_with_equal_logits(gpt2, tokens, tmp_path):
    model = gpt2
    theirs = save_with_peft(model, tmp_path, r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapter = peft_format.read(tmp_path)
    attach_weights(model, adapter)
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, atol=1e-6, rtol=0)
    assert adapter.fan_in_fan_out


@pytest.mark.parametrize("name", SETTINGS)
def test_reading_what_was_written_gives_the_same_bytes(llama, tmp_path, name):
    save_with_peft(llama, tmp_path, **SETTINGS[name])
    once = peft_format.dump(peft_format.read(tmp_path), "user/model")
    again = peft_format.dump(peft_format.parse(*once.values(), "x").adapter, "user/model")
    assert once == again


def test_dropped_settings_are_told(llama, tmp_path):
    save_with_peft(llama, tmp_path, **SETTINGS["layers"])
    (notice,) = peft_format.read_folder(tmp_path).notices
    assert notice.startswith("layers_to_transform is dropped")


@pytest.fixture
def folder(llama, tmp_path):
    """A sound PEFT folder: rank 2 on q_proj and v_proj."""
    attach(llama, LoraConfig(rank=2, targets=("q_proj", "v_proj")), seed=0)
    peft_format.write(extract(llama), tmp_path, "user/model")
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NUMBERS = [0, -1, 4.5, "4", True, 2_000_000, 10**12, None]
BAD_SETTINGS = [
    *(("r", value) for value in NUMBERS),
    *(("lora_alpha", value) for value in (0, -2, "16", 1e300, None, True)),
    *(("lora_dropout", value) for value in (1, -0.1, "0", None)),
    *(("target_modules", value) for value in ([], "", [""], [3], {"a": 1}, None)),
    ("alpha_pattern", {"(a+)+$": 4}),
    ("alpha_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": 2_000_000}),
    ("rank_pattern", ["q_proj"]),
    ("peft_type", "XLORA"),
    ("peft_type", None),
    ("use_dora", True),
    ("use_dora", "yes"),
    ("bias", "some"),
    ("lora_bias", True),
    ("modules_to_save", ["embed_tokens"]),
    ("modules_to_save", [".*"]),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("ensure_weight_tying", True),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("arrow_config", {"top_k": 2}),
    ("megatron_config", {"hidden_size": 8}),
    ("init_lora_weights", {"a": "b"}),
    ("layer_replication", [[0, 1]]),
    ("trainable_token_indices", [1]),
    ("target_parameters", ["x"]),
    ("task_type", "MAKE_COFFEE"),
    ("base_model_name_or_path", ["a"]),
    ("fan_in_fan_out", 1),
    ("never_heard_of", "x"),
]


@pytest.mark.parametrize(("key", "value"), BAD_SETTINGS, ids=[f"{k}={v}"[:40] for k, v in BAD_SETTINGS])
def test_a_setting_that_would_change_the_result_or_is_nonsense_is_refused_by_name(folder, key, value):
    edit_config(folder, **{key: value})
    with pytest.raises((Refused, Damaged), match=key):
        peft_format.read(folder)


@pytest.mark.parametrize("key", ["revision", "loftq_config", "eva_config", "corda_config", "auto_mapping"])
def test_a_setting_without_effect_is_dropped(folder, key):
    edit_config(folder, **{key: {"cache_file": "/etc/passwd"}})
    assert "passwd" not in str(peft_format.dump(peft_format.read(folder), None)["adapter_config.json"])


BAD_JSON = {
    "list": b"[]",
    "null": b"null",
    "empty": b"",
    "bom": b"\xef\xbb\xbf{}",
    "utf-16": '{"r": 1}'.encode("utf-16"),
    "twice": b'{"peft_type": "LORA", "r": 2, "r": 2}',
    "nan": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "huge float": b'{"peft_type": "LORA", "lora_alpha": 1e999}',
    "huge integer": b'{"r": ' + b"9" * 5000 + b"}",
    "beyond 64 bits": b'{"r": 9223372036854775808}',
    "deep": b'{"a": ' * 100_000,
    "deep and closed": b"[" * 20_000 + b"]" * 20_000,
    "pickle": b"\x80\x04\x95",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_config_that_is_no_plain_json_object_is_damaged(folder, name):
    (folder / "adapter_config.json").write_bytes(BAD_JSON[name])
    with pytest.raises((Damaged, Refused), match=r"adapter_config\.json"):
        peft_format.read(folder)


def test_a_huge_config_is_refused_unread(folder):
    (folder / "adapter_config.json").write_bytes(b" " * 10_000_000)
    with pytest.raises(Refused, match="10,000,000 bytes"):
        peft_format.read(folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
BAD_TENSORS = {
    "A without B": (lambda t: t.pop(B), "has no factor B"),
    "B without A": (lambda t: t.pop(A), "has no factor A"),
    "ranks differ": (lambda t: t.update({A: torch.zeros(3, 16)}), "factors of shapes"),
    "another rank than the config's": (lambda t: t.update({A: torch.zeros(3, 16), B: torch.zeros(16, 3)}), "rank 3"),
    "three dimensions": (lambda t: t.update({A: torch.zeros(2, 16, 1)}), "factors of shapes"),
    "huge rank": (lambda t: t.update({A: torch.zeros(5000, 1), B: torch.zeros(1, 5000)}), "rank 5,000"),
    "foreign": (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), "belongs to no LoRA factor"),
    "embedding": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_embedding_A"): torch.zeros(2, 2)}),
        "belongs to no LoRA",
    ),
    "climbing": (lambda t: t.update({"../../x": torch.zeros(2, 2)}), "other characters"),
    "nan": (lambda t: t[A].__setitem__((0, 0), float("nan")), "not finite"),
    "infinite": (lambda t: t[B].__setitem__((0, 0), float("-inf")), "not finite"),
    "integers": (lambda t: t.update({A: torch.zeros(2, 16, dtype=torch.int8)}), "dtype"),
    "none": (lambda t: t.clear(), "no tensor"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_are_not_a_lora_are_an_error_that_names_them(folder, name):
    change, message = BAD_TENSORS[name]
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises((Damaged, Refused), match=message):
        peft_format.read(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "x.pkl", "evil.py"])
def test_a_folder_with_a_pickle_or_a_program_is_refused(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(Refused, match="safetensors only"):
        peft_format.read(folder)


def test_a_folder_without_adapter_or_weights_says_so(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        peft_format.read(tmp_path_factory.mktemp("empty"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        peft_format.read(folder)


def test_a_slow_regular_expression_is_never_run(folder):
    edit_config(folder, target_modules="(a|a)*" * 20 + "$", rank_pattern={"(q+)+$" * 10: 2})
    assert len(peft_format.read(folder).modules) == 4


def test_a_method_that_peft_lacks_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="no place for an adapter of method 'gate'"):
        peft_format.write(Adapter("gate", {}), tmp_path, None)
