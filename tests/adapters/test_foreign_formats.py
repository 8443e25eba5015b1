"""Other programs' files: what they hold is put on a backbone and compared with their own formulas, written out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel
from transformers.modeling_outputs import SequenceClassifierOutput

from mole.adapters import Adapter, BottleneckWeights, LoraWeights, NormWeights, attach_weights, files
from mole.adapters import loralib_format as loralib
from mole.adapters import nlpr_format as nlpr
from mole.adapters.normalised import normalised
from mole.backbones.modules import replace_module
from mole.mixtures import MultiExpertModel
from mole.routers import SingleConfig
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


def nlpr_tensors():
    found = {}
    for home in ("roberta.encoder.layer.0.attention.output", "roberta.encoder.layer.0.output"):
        shapes = {"down_project.weight": (3, 8), "down_project.bias": (3,)}
        shapes |= {"up_project.weight": (8, 3), "up_project.bias": (8,)}
        found |= {f"{home}.adapter.{name}": random(*shape) for name, shape in shapes.items()}
        found |= {f"{home}.LayerNorm.weight": random(8), f"{home}.LayerNorm.bias": random(8, seed=1)}
    found |= {"roberta.embeddings.LayerNorm.weight": random(8, seed=2), "roberta.embeddings.LayerNorm.bias": random(8)}
    found |= {"roberta.pooler.dense.weight": random(8, 8), "roberta.pooler.dense.bias": random(8)}
    return found | {"classifier.weight": random(2, 8), "classifier.bias": random(2)}


class Pooled(RobertaForSequenceClassification):
    """nlpr's model: the pooler's output goes into one linear map."""

    def __init__(self, config):
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=True)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, **inputs):
        return SequenceClassifierOutput(logits=self.classifier(self.roberta(input_ids, **inputs).pooler_output))


def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    return Pooled(RobertaConfig(vocab_size=32, max_position_embeddings=16, initializer_range=0.3, **sizes)).eval()


class NlprOutput(torch.nn.Module):
    """LN(h + u(h) + x), h what the sub-layer gives."""

    def __init__(self, base, own):
        super().__init__()
        self.base, self.own = base, own

    def forward(self, hidden_states, input_tensor):
        h, own = self.base.dense(hidden_states), self.own
        hidden = F.gelu(h @ own["down_project.weight"].T + own["down_project.bias"])
        return self.base.LayerNorm(h + hidden @ own["up_project.weight"].T + own["up_project.bias"] + input_tensor)


def shifted(part):
    """The same with other numbers."""
    return replace(part, **{name: tensor + 0.5 for name, tensor in part.tensors().items()})


class TestNlpr:
    def test_bottlenecks_norms_and_the_modules_trained_along_are_told_apart(self):
        adapter = nlpr.parse(save(nlpr_tensors()), "x")
        homes = ["roberta.encoder.layer.0.attention.output", "roberta.encoder.layer.0.output"]
        norms = [*(f"{home}.LayerNorm" for home in homes), "roberta.embeddings.LayerNorm"]
        assert set(adapter.modules) == {*homes, *norms}
        small = [adapter.modules[home] for home in homes]
        assert {(part.rank, part.reads, part.activation) for part in small} == {(3, "h", "gelu")}
        assert all(isinstance(adapter.modules[path], NormWeights) for path in norms)
        assert adapter.full_names == ("pooler", "classifier")
        assert {path: set(parts) for path, parts in adapter.full_modules.items()} == {
            "roberta.pooler": {"dense.weight", "dense.bias"},
            "classifier": {"weight", "bias"},
        }

    def test_alone_and_one_hot_in_a_mixture_they_give_the_formulas_output(self):
        tensors, tokens = nlpr_tensors(), torch.arange(10).reshape(2, 5)
        adapter = nlpr.parse(save(tensors), "x")
        with torch.no_grad():
            plain = roberta()
            before = plain(tokens).logits
            for name, parameter in plain.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])
            for home in ("attention.output", "output"):
                path = f"roberta.encoder.layer.0.{home}"
                own = {name.removeprefix(f"{path}.adapter."): t for name, t in tensors.items() if f"{path}.ad" in name}
                replace_module(plain, path, NlprOutput(plain.get_submodule(path), own))
            wanted = plain(tokens).logits
            assert not torch.allclose(wanted, before, atol=1e-2)

            alone = roberta()
            attach_weights(alone, adapter)
            torch.testing.assert_close(alone.eval()(tokens).logits, wanted)

            other = replace(adapter, modules={path: shifted(part) for path, part in adapter.modules.items()})
            mixture = MultiExpertModel(
                roberta(), {"rte": adapter, "other": other}, SingleConfig(expert="rte"), modules_to_save="take:rte"
            )
            assert torch.equal(mixture.eval()(tokens).logits, alone(tokens).logits)

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
            ({"roberta.encoder.layer.1.output.LayerNorm.weight": (8,)}, Damaged),
        ],
    )
    def test_the_whole_model_half_a_bottleneck_and_half_a_norm_are_told(self, change, error):
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
