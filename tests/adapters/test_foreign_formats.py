"""Other programs' files: what they hold is put on a backbone and compared with their own formulas, written out."""

import json

import pytest
import torch
from safetensors.torch import save
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from mole.adapters import Adapter, BottleneckWeights, LoraWeights, attach_weights, files
from mole.adapters import adapterhub_format as adapterhub
from mole.adapters import loralib_format as loralib
from mole.adapters import nlpr_format as nlpr
from mole.adapters.normalised import normalised
from mole.untrusted import Damaged, Refused


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class TestLoralib:
    def test_plain_factors_are_read_with_the_scale_that_is_given(self):
        tensors = {"h.0.fc.lora_A": random(2, 6), "h.0.fc.lora_B": random(4, 2), "h.0.fc.bias": random(4)}
        adapter = loralib.parse(save(tensors), "x", alpha=8.0)
        (part,) = adapter.modules.values()
        assert (part.scale, part.rank, adapter.bias_kind) == (4.0, 2, "lora_only")
        assert torch.equal(part.A, tensors["h.0.fc.lora_A"])
        assert torch.equal(adapter.biases["h.0.fc"], tensors["h.0.fc.bias"])

    @pytest.mark.parametrize("blocks", [(True, False, True), (True, True, True), (False, True, False)])
    def test_a_merged_module_is_one_product_with_the_same_output(self, blocks):
        rank, d_in, size, alpha, count = 2, 5, 4, 6.0, sum(blocks)
        A, B = random(count * rank, d_in), random(count * size, rank)
        tensors = {"h.0.attn.c_attn.lora_A": A, "h.0.attn.c_attn.lora_B": B}
        adapter = loralib.parse(save(tensors), "x", alpha=alpha, blocks=blocks, transposed=True)
        (part,) = adapter.modules.values()
        x = random(3, d_in)
        # what loralib computes: one group of a convolution for each adapted block, put where the block is
        grouped = F.conv1d(F.linear(x, A).T[None], B[:, :, None], groups=count)[0].T
        wanted = torch.zeros(3, len(blocks) * size)
        wanted[:, torch.tensor(blocks).repeat_interleave(size)] = grouped * alpha / rank
        torch.testing.assert_close(part.scale * x @ part.A.T @ part.B.T, wanted)
        assert adapter.fan_in_fan_out

    def test_an_embedding_is_known_by_its_name(self):
        tensors = {"transformer.wte.lora_A": random(2, 32), "transformer.wte.lora_B": random(16, 2)}
        (part,) = loralib.parse(save(tensors), "x", alpha=2.0).modules.values()
        assert part.kind == "embedding"

    @pytest.mark.parametrize(
        ("tensors", "error", "told"),
        [
            ({"a.lora_A": (4, 6), "a.lora_B": (8, 2)}, Refused, "say which blocks are adapted"),
            ({"a.lora_A": (2, 6)}, Damaged, "has no factor B"),
            ({"a.weight": (2, 6), "a.lora_A": (2, 6)}, Refused, "loralib.lora_state_dict"),
            ({"a.bias": (2,)}, Damaged, "no tensor of a LoRA factor"),
            ({"a.lora_A": (3, 6), "a.lora_B": (8, 2)}, Damaged, "shapes"),
            ({"a/../b.lora_A": (2, 6)}, Refused, "other characters"),
        ],
    )
    def test_what_is_no_such_state_dict_is_told(self, tensors, error, told):
        with pytest.raises(error, match=told):
            loralib.parse(save({name: random(*shape) for name, shape in tensors.items()}), "x", alpha=1.0)

    def test_another_number_of_blocks_is_told(self):
        tensors = {"a.lora_A": random(4, 6), "a.lora_B": random(8, 2)}
        with pytest.raises(Refused, match="factors for 2 blocks of outputs, blocks names 3"):
            loralib.parse(save(tensors), "x", alpha=1.0, blocks=(True, True, True))


BOTTLENECK = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 8,
    "residual_before_ln": True,
    "scaling": 1.5,
    "use_gating": False,
}
LORA = {"architecture": "lora", "alpha": 16, "attn_matrices": ["q", "v"], "composition_mode": "add", "r": 2}
HUB = {"hidden_size": 16, "model_name": "user/llama", "model_type": "llama", "name": "sst", "version": "adapters.1.2.0"}


def bottleneck_tensors(homes, width=16, size=2):
    found = {}
    for place, home in enumerate(homes):
        shapes = {"adapter_down.0.weight": (size, width), "adapter_down.0.bias": (size,)}
        shapes |= {"adapter_up.weight": (width, size), "adapter_up.bias": (width,)}
        found |= {f"{home}.adapters.sst.{name}": random(*shape, seed=place) for name, shape in shapes.items()}
    return found


def hub_folder(fields, tensors, **changes):
    return json.dumps({**HUB, **changes, "config": fields}).encode(), save(tensors)


class TestAdapterHub:
    def test_a_bottleneck_gives_the_formulas_output(self, llama, tokens):
        homes = [f"model.layers.{n}.{name}_adapters" for n in range(2) for name in ("attention", "output")]
        tensors = bottleneck_tensors(homes)
        found = adapterhub.parse(*hub_folder(BOTTLENECK, tensors), "x")
        assert (found.backbone, found.name, found.adapter.method) == ("user/llama", "sst", "bottleneck")
        with torch.no_grad():
            plain = llama(tokens).logits
            hooks = []
            for home in homes:
                layer, kind = home.split(".")[2], home.split(".")[3]
                path = f"model.layers.{layer}." + (
                    "self_attn.o_proj" if kind == "attention_adapters" else "mlp.down_proj"
                )
                D, b, U, c = (
                    tensors[f"{home}.adapters.sst.{name}"]
                    for name in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
                )

                def add(module, inputs, h, D=D, b=b, U=U, c=c):
                    return h + 1.5 * (F.silu(h @ D.T + b) @ U.T + c)

                hooks.append(llama.get_submodule(path).register_forward_hook(add))
            wanted = llama(tokens).logits
            for hook in hooks:
                hook.remove()
            attach_weights(llama, found.adapter)
            torch.testing.assert_close(llama(tokens).logits, wanted)
            assert not torch.allclose(wanted, plain, atol=1e-2)

    def test_the_places_in_an_encoder_are_modules_of_it(self):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = BertModel(BertConfig(vocab_size=32, **sizes))
        tensors = bottleneck_tensors(["encoder.layer.0.attention.output", "encoder.layer.0.output"])
        found = adapterhub.parse(*hub_folder(BOTTLENECK, tensors, model_type="bert"), "x")
        assert list(found.adapter.modules) == ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"]
        attach_weights(model, found.adapter)

    @pytest.mark.parametrize("named", ["double_seq_bn", "houlsby"])
    def test_a_config_by_name_is_that_of_the_name(self, named):
        found = adapterhub.parse(*hub_folder(named, bottleneck_tensors(["model.layers.0.output_adapters"])), "x")
        (part,) = found.adapter.modules.values()
        assert (part.activation, part.scale) == ("silu", 1.0)

    def test_a_lora_is_read_with_its_scale(self):
        home = "model.layers.0.self_attn.q_proj.loras.sst"
        tensors = {f"{home}.lora_A": random(2, 16), f"{home}.lora_B": random(16, 2)}
        adapter = adapterhub.parse(*hub_folder(LORA, tensors), "x").adapter
        assert {path: part.scale for path, part in adapter.modules.items()} == {"model.layers.0.self_attn.q_proj": 8.0}

    def test_a_merged_lora_of_gpt2_adapts_the_blocks_that_its_config_names(self):
        home = "transformer.h.0.attn.c_attn.loras.sst"
        tensors = {f"{home}.lora_A": random(4, 16), f"{home}.lora_B": random(32, 2)}
        adapter = adapterhub.parse(*hub_folder(LORA, tensors, model_type="gpt2"), "x").adapter
        (part,) = adapter.modules.values()
        assert (part.B.shape, part.scale) == ((48, 4), 8.0)
        assert (part.B[16:32] == 0).all()
        assert adapter.fan_in_fan_out

    @pytest.mark.parametrize("version", [None, "3.2.1", "adapters.0.9.9", "adapters.1.0.1"])
    def test_the_scale_of_an_old_lora_has_to_be_given(self, version):
        home = "model.layers.0.self_attn.q_proj.loras.sst"
        folder = hub_folder(LORA, {f"{home}.lora_A": random(2, 16), f"{home}.lora_B": random(16, 2)}, version=version)
        with pytest.raises(Refused, match="say the one of the training with alpha"):
            adapterhub.parse(*folder, "x")
        (part,) = adapterhub.parse(*folder, "x", alpha=6.0).adapter.modules.values()
        assert part.scale == 3.0

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"original_ln_before": True}, "original_ln_before .* reads other values"),
            ({"is_parallel": True}, "is_parallel .* reads other values"),
            ({"ln_before": True}, "ln_before is True"),
            ({"ln_after": True}, "ln_after is True"),
            ({"use_gating": True}, "use_gating is True"),
            ({"phm_layer": True}, "phm_layer is True"),
            ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
            ({"residual_before_ln": "post_add"}, "residual_before_ln"),
            ({"scaling": "learned"}, "scaling is 'learned'"),
            ({"non_linearity": "leakyrelu"}, "non_linearity"),
            ({"architecture": "prefix_tuning"}, "architecture 'prefix_tuning'"),
            ({"surprise": 1}, "surprise is set to 1"),
            ({"dropout": 1.0}, "dropout is 1.0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_field_that_changes_the_maths_is_named(self, change, told):
        tensors = bottleneck_tensors(["model.layers.0.output_adapters"])
        with pytest.raises(Refused, match=told):
            adapterhub.parse(*hub_folder({**BOTTLENECK, **change}, tensors), "x")

    @pytest.mark.parametrize(
        "named", ["seq_bn", "pfeiffer", "par_bn", "compacter", "double_seq_bn[reduction_factor=2]"]
    )
    def test_a_config_by_another_name_is_refused(self, named):
        with pytest.raises(Refused, match="config"):
            adapterhub.parse(*hub_folder(named, bottleneck_tensors(["model.layers.0.output_adapters"])), "x")

    @pytest.mark.parametrize(
        ("homes", "changes", "told"),
        [
            (["model.layers.0.elsewhere"], {}, "is at no place of a llama"),
            (["model.layers.0.output_adapters"], {"model_type": "gpt_neox"}, "known: bert"),
            (["model.layers.0.output_adapters"], {"model_type": None}, "model_type is None"),
        ],
    )
    def test_tensors_at_no_place_of_the_backbone_are_told(self, homes, changes, told):
        with pytest.raises(Refused, match=told):
            adapterhub.parse(*hub_folder(BOTTLENECK, bottleneck_tensors(homes), **changes), "x")

    def test_tensors_of_two_adapters_are_refused(self):
        tensors = bottleneck_tensors(["model.layers.0.output_adapters"])
        tensors |= {name.replace(".sst.", ".mrpc."): tensor.clone() for name, tensor in tensors.items()}
        with pytest.raises(Refused, match="several adapters"):
            adapterhub.parse(*hub_folder(BOTTLENECK, tensors), "x")

    @pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
    def test_what_is_written_is_read_bit_for_bit(self, model_type):
        sites = adapterhub.SITES[model_type]
        tensors = bottleneck_tensors([f"model.layers.{n}.{end}" for n in range(2) for end in sites])
        made = adapterhub.parse(*hub_folder(BOTTLENECK, tensors, model_type=model_type), "x").adapter
        written = adapterhub.dump(made, "sst", "user/model", model_type, 16)
        again = adapterhub.parse(written[adapterhub.CONFIG], written[adapterhub.WEIGHTS], "y")
        assert again.backbone == "user/model"
        assert again.adapter.tensors().keys() == made.tensors().keys()
        assert all(torch.equal(again.adapter.tensors()[n], t) for n, t in made.tensors().items())
        assert written == adapterhub.dump(again.adapter, "sst", "user/model", model_type, 16)


def nlpr_tensors():
    found = {}
    for home in ("roberta.encoder.layer.0.attention.output", "roberta.encoder.layer.0.output"):
        shapes = {"down_project.weight": (3, 8), "down_project.bias": (3,)}
        shapes |= {"up_project.weight": (8, 3), "up_project.bias": (8,)}
        found |= {f"{home}.adapter.{name}": random(*shape) for name, shape in shapes.items()}
        found |= {f"{home}.LayerNorm.weight": random(8), f"{home}.LayerNorm.bias": random(8)}
    found |= {"roberta.pooler.dense.weight": random(8, 8), "classifier.weight": random(2, 8)}
    return found


class TestNlpr:
    def test_bottlenecks_and_the_modules_trained_along_are_told_apart(self):
        adapter = nlpr.parse(save(nlpr_tensors()), "x")
        assert list(adapter.modules) == [
            "roberta.encoder.layer.0.attention.output.dense",
            "roberta.encoder.layer.0.output.dense",
        ]
        assert {part.rank for part in adapter.modules.values()} == {3}
        assert adapter.full_names == ("LayerNorm", "pooler", "classifier")
        assert set(adapter.full_modules) == {
            "roberta.encoder.layer.0.attention.output.LayerNorm",
            "roberta.encoder.layer.0.output.LayerNorm",
            "roberta.pooler.dense",
            "classifier",
        }

    def test_they_survive_an_experts_files(self):
        adapter = nlpr.parse(save(nlpr_tensors()), "x")
        again = files.parse(files.dump(adapter, "roberta-base"), "y").adapter
        assert again.full_names == adapter.full_names
        assert again.tensors().keys() == adapter.tensors().keys()
        assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"roberta.encoder.layer.0.output.dense.weight": (8, 8)}, Refused),
            ({"roberta.encoder.layer.1.output.adapter.down_project.weight": (3, 8)}, Damaged),
        ],
    )
    def test_the_whole_model_and_half_a_bottleneck_are_told(self, change, error):
        tensors = {**nlpr_tensors(), **{name: random(*shape) for name, shape in change.items()}}
        with pytest.raises(error, match="only what was trained is wanted|has no tensor"):
            nlpr.parse(save(tensors), "x")


def test_a_module_that_the_config_does_not_name_is_refused():
    written = files.dump(nlpr.parse(save(nlpr_tensors()), "x"), "roberta-base")
    node = json.loads(written["mole_adapter.json"])
    node["full_names"] = ["classifier"]
    with pytest.raises(Refused, match="full_names does not name"):
        files.parse({**written, "mole_adapter.json": json.dumps(node).encode()}, "y")


def unlike_parts():
    return {
        "q": LoraWeights(A=random(3, 6), B=random(4, 3), alpha=2.0),
        "v": LoraWeights(A=random(1, 6), B=random(4, 1), alpha=5.0, rslora=True),
        "wte": LoraWeights(A=random(2, 9), B=random(6, 2), alpha=1.0, embedding=True),
    }


class TestNormalised:
    def test_one_rank_and_a_scale_of_one_add_the_same(self):
        made = normalised(Adapter("lora", unlike_parts()))
        assert {(part.rank, part.alpha, part.rslora) for part in made.modules.values()} == {(3, 3.0, False)}
        for path, part in unlike_parts().items():
            wanted = part.scale * part.B @ part.A
            torch.testing.assert_close(made.modules[path].B @ made.modules[path].A, wanted)

    def test_a_config_says_all_in_r_and_alpha(self):
        config = json.loads(files.dump(normalised(Adapter("lora", unlike_parts())), "m")["adapter_config.json"])
        assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (3, 3.0, False, False)
        assert config["rank_pattern"] == config["alpha_pattern"] == {}

    @pytest.mark.parametrize(
        ("adapter", "told"),
        [
            (Adapter("lora", {"q": LoraWeights(random(1, 4), random(4, 1), 1.0, magnitude=random(4))}), "DoRA"),
            (Adapter("lora", {"q": LoraWeights(random(1, 4), random(4, 1), 1.0, bias=random(4))}), "lora_bias"),
            (Adapter("lora", {"q": LoraWeights(random(1, 4, 3), random(4, 1, 1), 1.0)}), "convolution"),
            (Adapter("lora", unlike_parts(), biases={"q": random(4)}), "weights of the backbone itself"),
            (
                Adapter("bottleneck", {"q": BottleneckWeights(random(2, 4), random(2), random(4, 2), random(4))}),
                "only LoRA",
            ),
        ],
        ids=["dora", "bias", "convolution", "biases", "bottleneck"],
    )
    def test_what_servers_do_not_read_is_refused(self, adapter, told):
        with pytest.raises(ValueError, match=told):
            normalised(adapter)
