"""AdapterHub's folders: put on a backbone they give its own formulas' output; what is written is read bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from adapterhub_cases import BLOCKS, FIELDS, KINDS, TOKENS, encoder, folder, homes, put_theirs, random, tensors_at
from adapterhub_cases import tensors_of as of
from safetensors.torch import save
from torch.nn import functional as F

from mole.adapters import Adapter, BottleneckWeights, NormWeights, attach_weights, files
from mole.adapters import adapterhub_format as adapterhub
from mole.adapters import adapterhub_heads as hub_heads
from mole.adapters.adapterhub_format import Target
from mole.untrusted import Damaged, Refused

LORA = {"architecture": "lora", "alpha": 16, "attn_matrices": ["q", "v"], "composition_mode": "add", "r": 2}
READS = {"double_seq_bn": "h", "seq_bn": "normed", "par_bn": "x"}


def equal(adapter, other):
    """Whether both are the same in all that an expert's files tell, but for how its modules are found."""
    ours, theirs = files.dump(adapter, "m"), files.dump(other, "m")
    return ours == theirs


class TestBottlenecks:
    @pytest.mark.parametrize("scaling", [1.5, "learned"])
    @pytest.mark.parametrize("named", KINDS)
    @pytest.mark.parametrize("kind", ["bert", "electra", "roberta"])
    def test_a_folder_gives_the_formulas_output(self, kind, named, scaling):
        fields = {**KINDS[named], "scaling": scaling}
        tensors = of(kind, fields)
        found = adapterhub.parse(*folder(fields, tensors, kind), "x")
        assert (found.backbone, found.name, found.adapter.method) == ("user/model", "sst", "bottleneck")
        assert {part.reads for part in found.adapter.modules.values()} == {READS[named]}
        theirs, mine = encoder(kind), encoder(kind)
        with torch.no_grad():
            plain = theirs(TOKENS).logits
            put_theirs(theirs, fields, [tensors])
            wanted = theirs(TOKENS).logits
            attach_weights(mine, found.adapter)
            torch.testing.assert_close(mine(TOKENS).logits, wanted)
        assert not torch.allclose(wanted, plain, atol=1e-2)

    def test_before_a_norm_what_reads_the_sub_layers_output_does_so(self, llama, tokens):
        tensors = tensors_at(homes("llama", blocks=range(2)))
        adapter = adapterhub.parse(*folder(FIELDS, tensors, "llama"), "x").adapter
        with torch.no_grad():
            plain, hooks = llama(tokens).logits, []
            for home in homes("llama", blocks=range(2)):
                end = "self_attn.o_proj" if home.endswith("attention_adapters") else "mlp.down_proj"
                own = [tensors[f"{home}.adapters.sst.adapter_{n}"] for n in ("down.0.weight", "down.0.bias")]
                own += [tensors[f"{home}.adapters.sst.adapter_up.{n}"] for n in ("weight", "bias")]

                def add(module, inputs, h, own=own):
                    D, b, U, c = own
                    return h + 1.5 * (F.silu(h @ D.T + b) @ U.T + c)

                module = llama.get_submodule(f"{home.rpartition('.')[0]}.{end}")
                hooks.append(module.register_forward_hook(add))
            wanted = llama(tokens).logits
            for hook in hooks:
                hook.remove()
            attach_weights(llama, adapter)
            torch.testing.assert_close(llama(tokens).logits, wanted)
        assert not torch.allclose(wanted, plain, atol=1e-2)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize(("named", "field"), [("seq_bn", "original_ln_before"), ("par_bn", "is_parallel")])
    def test_before_a_norm_the_others_are_refused(self, kind, named, field):
        with pytest.raises(Refused, match=f"{field} is True: in a {kind}.* no norm closes"):
            adapterhub.parse(*folder(KINDS[named], of(kind, KINDS[named]), kind), "x")

    @pytest.mark.parametrize(
        ("named", "size", "told"),
        [
            ("double_seq_bn", 1, ("swish", 1.0, "h")),
            ("houlsby", 1, ("swish", 1.0, "h")),
            ("seq_bn", 1, ("relu", 1.0, "normed")),
            ("pfeiffer", 1, ("relu", 1.0, "normed")),
            ("par_bn", 8, ("relu", 4.0, "x")),
            ("parallel", 8, ("relu", 4.0, "x")),
            ("scaled_parallel", 8, ("relu", 4.0, "x")),
        ],
    )
    def test_a_config_by_name_is_that_of_the_name(self, named, size, told):
        parts = ("attention.output", "output") if told[2] == "h" else ("output",)
        places = homes("bert", parts)
        found = adapterhub.parse(*folder(named, tensors_at(places, [size] * len(places))), "x").adapter
        assert list(found.modules) == places
        assert {(p.activation, p.scale, p.reads) for p in found.modules.values()} == {told}

    def test_sizes_and_blocks_are_as_the_config_says(self):
        fields = {**KINDS["seq_bn"], "reduction_factor": {"0": 4, "default": 8}, "leave_out": [1]}
        places = homes("bert", ["output"], blocks=[0, 2])
        found = adapterhub.parse(*folder(fields, tensors_at(places, [4, 2])), "x").adapter
        assert {path: part.rank for path, part in found.modules.items()} == dict(zip(places, [4, 2], strict=True))
        with pytest.raises(Damaged, match="4 features in the weights of .*layer.2.output, 2 by reduction_factor"):
            adapterhub.parse(*folder(fields, tensors_at(places, [4, 4])), "x")

    @pytest.mark.parametrize(
        ("change", "places", "error", "told"),
        [
            ({"leave_out": [1]}, homes("bert"), Refused, "block 1, which leave_out names"),
            ({"mh_adapter": False}, homes("bert"), Refused, "mh_adapter is False"),
            ({}, homes("bert", blocks=[0, 2]), Damaged, "block 1 has no tensor for mh_adapter"),
            ({}, homes("bert", ["attention.output"]), Damaged, "block 0 has no tensor for output_adapter"),
        ],
    )
    def test_tensors_that_the_config_does_not_speak_of_are_told(self, change, places, error, told):
        with pytest.raises(error, match=told):
            adapterhub.parse(*folder({**FIELDS, **change}, tensors_at(places)), "x")

    def test_a_learned_scale_is_a_tensor_and_no_other_is(self):
        tensors = of("bert", {**FIELDS, "scaling": "learned"})
        with pytest.raises(Refused, match="has a tensor scaling, and the config's scaling is 1.5"):
            adapterhub.parse(*folder(FIELDS, tensors), "x")
        with pytest.raises(Damaged, match="output has no tensor scaling"):
            adapterhub.parse(*folder({**FIELDS, "scaling": "learned"}, of("bert", FIELDS)), "x")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"ln_before": True}, "ln_before is True"),
            ({"ln_after": True}, "ln_after is True"),
            ({"original_ln_after": False}, "original_ln_after is False"),
            ({"original_ln_before": 1}, "original_ln_before is 1"),
            ({"original_ln_before": True, "is_parallel": True}, "is_parallel and original_ln_before"),
            ({"adapter_residual_before_ln": True}, "adapter_residual_before_ln is True"),
            ({"use_gating": True}, "use_gating is True"),
            ({"phm_layer": True}, "phm_layer is True"),
            ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
            ({"cross_adapter": True}, "cross_adapter is True"),
            ({"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
            ({"residual_before_ln": False}, "residual_before_ln is False"),
            ({"stochastic_depth": 0.1}, "stochastic_depth is 0.1"),
            ({"scaling": "channel"}, "scaling is 'channel'"),
            ({"scaling": 0.0}, "scaling is 0.0"),
            ({"non_linearity": "maxout"}, "non_linearity 'maxout'"),
            ({"architecture": "prefix_tuning"}, "architecture 'prefix_tuning'"),
            ({"surprise": 1}, "surprise is set to 1"),
            ({"dropout": 1.0}, "dropout is 1.0"),
            ({"reduction_factor": {"first": 2}}, "reduction_factor is"),
            ({"leave_out": "all"}, "leave_out is 'all'"),
            ({"mh_adapter": None}, "mh_adapter is None"),
            ({"mh_adapter": False, "output_adapter": False}, "mh_adapter and output_adapter are False"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_a_field_that_changes_the_maths_is_named(self, change, told):
        with pytest.raises(Refused, match=told):
            adapterhub.parse(*folder({**FIELDS, **change}, of("bert", FIELDS)), "x")

    @pytest.mark.parametrize("named", ["compacter", "mam", "double_seq_bn[reduction_factor=2]"])
    def test_a_config_by_another_name_is_refused(self, named):
        with pytest.raises(Refused, match="config .* mole knows seq_bn, double_seq_bn"):
            adapterhub.parse(*folder(named, of("bert", FIELDS)), "x")

    @pytest.mark.parametrize(
        ("places", "changes", "told"),
        [
            (["bert.encoder.layer.0.elsewhere"], {}, "is at no place of a bert"),
            (homes("bert"), {"model_type": "gpt_neox"}, "known: bert"),
            (homes("bert"), {"model_type": None}, "model_type is None"),
        ],
    )
    def test_tensors_at_no_place_of_the_backbone_are_told(self, places, changes, told):
        with pytest.raises(Refused, match=told):
            adapterhub.parse(*folder(FIELDS, tensors_at(places), **changes), "x")

    def test_tensors_of_two_adapters_are_refused(self):
        tensors = of("bert", FIELDS) | of("bert", FIELDS, name="mrpc")
        with pytest.raises(Refused, match="several adapters"):
            adapterhub.parse(*folder(FIELDS, tensors), "x")


class TestLora:
    home = "model.layers.0.self_attn.q_proj.loras.sst"

    def test_it_is_read_with_its_scale(self):
        tensors = {f"{self.home}.lora_A": random(2, 16), f"{self.home}.lora_B": random(16, 2)}
        adapter = adapterhub.parse(*folder(LORA, tensors, "llama"), "x").adapter
        assert {path: part.scale for path, part in adapter.modules.items()} == {"model.layers.0.self_attn.q_proj": 8.0}

    def test_a_merged_one_of_gpt2_adapts_the_blocks_that_its_config_names(self):
        home = "transformer.h.0.attn.c_attn.loras.sst"
        tensors = {f"{home}.lora_A": random(4, 16), f"{home}.lora_B": random(32, 2)}
        adapter = adapterhub.parse(*folder(LORA, tensors, "gpt2"), "x").adapter
        (part,) = adapter.modules.values()
        assert (part.B.shape, part.scale) == ((48, 4), 8.0)
        assert (part.B[16:32] == 0).all()
        assert adapter.fan_in_fan_out

    @pytest.mark.parametrize("version", [None, "3.2.1", "adapters.0.9.9", "adapters.1.0.1"])
    def test_the_scale_of_an_old_one_has_to_be_given(self, version):
        tensors = {f"{self.home}.lora_A": random(2, 16), f"{self.home}.lora_B": random(16, 2)}
        given = folder(LORA, tensors, "llama", version=version)
        with pytest.raises(Refused, match="say the one of the training with alpha"):
            adapterhub.parse(*given, "x")
        (part,) = adapterhub.parse(*given, "x", alpha=6.0).adapter.modules.values()
        assert part.scale == 3.0

    def test_another_way_to_put_it_on_is_refused(self):
        tensors = {f"{self.home}.lora_A": random(2, 16), f"{self.home}.lora_B": random(16, 2)}
        with pytest.raises(Refused, match="composition_mode is 'scale': only LoRA's sum"):
            adapterhub.parse(*folder({**LORA, "composition_mode": "scale"}, tensors, "llama"), "x")


def small(size, *, seed=0, learned=False, reads="h", activation="gelu", scale=1.0):
    parts = [random(size, 16, seed=seed), random(size), random(16, size, seed=seed), random(16, seed=seed)]
    gain = random(1) if learned else None
    return BottleneckWeights(*parts, gain=gain, activation=activation, scale=scale, reads=reads)


def written(adapter, kind="bert", **target):
    made = adapterhub.dump(adapter, "sst", "user/model", Target(kind, 16, **target))
    return made, adapterhub.parse(made[adapterhub.CONFIG], made[adapterhub.WEIGHTS], "y").adapter


class TestWriting:
    @pytest.mark.parametrize(
        ("kind", "named"),
        [(k, n) for k in ("bert", "deberta-v2", "electra", "roberta", "xlm-roberta") for n in KINDS]
        + [("llama", "double_seq_bn"), ("gpt2", "double_seq_bn")],
    )
    @pytest.mark.parametrize("scaling", [2.5, "learned"])
    def test_what_was_read_is_written_and_read_bit_for_bit(self, kind, named, scaling):
        fields = {**KINDS[named], "scaling": scaling, "dropout": 0.1, "non_linearity": "leakyrelu"}
        made = adapterhub.parse(*folder(fields, of(kind, fields), kind), "x").adapter
        first, again = written(made, kind)
        assert equal(again, made)
        assert written(again, kind)[0] == first
        config = json.loads(first[adapterhub.CONFIG])["config"]
        for key in set(fields) - {"non_linearity", "init_weights"}:
            assert config[key] == fields[key], key

    @pytest.mark.parametrize("size", [1, 3, 5, 6, 7, 11, 16, 17, 40])
    @pytest.mark.parametrize("width", [10, 16, 768])
    def test_the_reduction_factor_gives_the_size_back(self, width, size):
        factor = adapterhub.factor_for({0: size}, width)
        assert int(width // factor) == size

    def test_unlike_sizes_and_left_out_blocks_are_in_the_config(self):
        modules = {
            f"{home}": small(size, seed=n)
            for n, (home, size) in enumerate(zip(homes("bert", blocks=[0, 2]), [3, 3, 5, 5], strict=True))
        }
        made, again = written(Adapter("bottleneck", modules), num_layers=5)
        config = json.loads(made[adapterhub.CONFIG])["config"]
        assert config["leave_out"] == [1, 3, 4]
        assert set(config["reduction_factor"]) == {"default", "2"}
        assert {path: part.rank for path, part in again.modules.items()} == {p: s.rank for p, s in modules.items()}
        assert all(torch.equal(again.tensors()[n], t) for n, t in Adapter("bottleneck", modules).tensors().items())

    @pytest.mark.parametrize(
        ("modules", "target", "told"),
        [
            ([small(2), small(3)], {}, "one size for both bottlenecks of a block"),
            ([small(2), small(2, activation="relu")], {}, "one activation, scale and input"),
            ([small(2), small(2, reads="x")], {}, "one activation, scale and input"),
            ([small(2), small(2, scale=2.0)], {}, "one activation, scale and input"),
            ([small(2, learned=True, scale=2.0)] * 2, {}, "no place for a factor 2.0 beside the learned scale"),
            ([small(2)] * 3, {}, "the same sub-layers of every block"),
            ([small(2)] * 4, {"num_layers": 1}, "num_layers=1, and a bottleneck is in block 1"),
        ],
    )
    def test_what_the_format_cannot_hold_is_refused(self, modules, target, told):
        adapter = Adapter("bottleneck", dict(zip(homes("bert"), modules, strict=False)))
        with pytest.raises(ValueError, match=told):
            written(adapter, **target)

    @pytest.mark.parametrize(
        ("path", "part", "kind", "told"),
        [
            ("bert.encoder.layer.0.output", small(2), "gpt_neox", "model_type 'gpt_neox'; known: bert"),
            ("bert.elsewhere", small(2), "bert", "no place for the bottleneck at bert.elsewhere"),
            ("model.layers.0.mlp", small(2, reads="input"), "llama", "model.layers.0.mlp, which reads input"),
            ("bert.encoder.layer.0.output.LayerNorm", NormWeights(random(16)), "bert", "1 trained norm"),
        ],
    )
    def test_what_is_at_no_place_is_refused(self, path, part, kind, told):
        with pytest.raises(ValueError, match=told):
            written(Adapter("bottleneck", {path: part}), kind)

    def test_norms_can_be_left_out(self):
        norms = {f"bert.{name}.LayerNorm": NormWeights(random(16), random(16)) for name in ("embeddings", "x")}
        kept, lost = adapterhub.holdable(Adapter("bottleneck", {"bert.encoder.layer.0.output": small(2), **norms}))
        assert (list(kept.modules), lost) == (["bert.encoder.layer.0.output"], ("2 trained norms",))
        assert adapterhub.holdable(kept) == (kept, ())


FLEXIBLE = {"head_type": "classification", "bias": True, "dropout_prob": None, "num_labels": 3}
LABELS = {"entailment": 1, "contradiction": 0, "neutral": 2}


def head_folder(kind, tensors, **fields):
    config = None if not fields else {**FLEXIBLE, **fields}
    return json.dumps({"model_type": kind, "name": "sst", "config": config}).encode(), save(tensors)


def two_maps():
    shapes = {"1.weight": (16, 16), "1.bias": (16,), "4.weight": (3, 16), "4.bias": (3,)}
    return {f"heads.sst.{name}": random(*shape) for name, shape in shapes.items()}


class TestHeads:
    @pytest.mark.parametrize(
        ("kind", "activation", "middle"),
        [("bert", "tanh", torch.tanh), ("roberta", "tanh", torch.tanh), ("electra", "gelu", F.gelu)],
    )
    def test_two_maps_of_the_first_token_give_the_formulas_output(self, kind, activation, middle):
        tensors = two_maps()
        given = head_folder(kind, tensors, layers=2, activation_function=activation, use_pooler=False, label2id=LABELS)
        found = hub_heads.parse(*given, "x")
        assert found.labels == ("contradiction", "entailment", "neutral")
        model = encoder(kind)
        with torch.no_grad():
            first = model.base_model(TOKENS)[0][:, 0]
            hidden = middle(first @ tensors["heads.sst.1.weight"].T + tensors["heads.sst.1.bias"])
            wanted = hidden @ tensors["heads.sst.4.weight"].T + tensors["heads.sst.4.bias"]
            nothing = replace(small(1), up=torch.zeros(16, 1), up_bias=torch.zeros(16))
            attach_weights(model, Adapter("bottleneck", {homes(kind)[0]: nothing}, full_modules=found.modules))
            torch.testing.assert_close(model.eval()(TOKENS).logits, wanted)

    def test_one_map_of_the_pooler_is_the_classifier(self):
        tensors = {"heads.sst.1.weight": random(3, 16), "heads.sst.1.bias": random(3)}
        given = head_folder("bert", tensors, layers=1, use_pooler=True, activation_function="tanh", label2id=None)
        found = hub_heads.parse(*given, "x")
        assert {path: set(parts) for path, parts in found.modules.items()} == {"classifier": {"weight", "bias"}}
        assert found.labels is None

    def test_one_under_the_backbones_own_names_is_taken_as_it_is(self):
        tensors = {"classifier.dense.weight": random(16, 16), "classifier.out_proj.weight": random(1, 16)}
        found = hub_heads.parse(*head_folder("roberta", tensors), "x")
        assert {path: set(parts) for path, parts in found.modules.items()} == {
            "classifier": {"dense.weight", "out_proj.weight"}
        }

    def test_one_output_is_a_number(self):
        tensors = two_maps() | {"heads.sst.4.weight": random(1, 16), "heads.sst.4.bias": random(1)}
        given = head_folder("bert", tensors, layers=2, activation_function="tanh", num_labels=1)
        assert hub_heads.parse(*given, "x").labels == ()

    @pytest.mark.parametrize(
        ("kind", "fields", "told"),
        [
            ("bert", {"head_type": "masked_lm"}, "head_type is 'masked_lm'"),
            ("bert", {"layers": 3, "activation_function": "tanh"}, "layers 3.*another form"),
            ("bert", {"layers": 2, "activation_function": "relu"}, "activation_function 'relu'.*another form"),
            ("bert", {"layers": 2, "activation_function": "tanh", "use_pooler": True}, "use_pooler True.*another form"),
            ("roberta", {"layers": 1, "use_pooler": True}, "layers 1.*another form"),
            ("llama", {"layers": 2, "activation_function": "tanh"}, "that of a llama"),
            ("bert", {"layers": 1, "use_pooler": True}, "weight and bias of 1 maps"),
            ("bert", {"layers": 2, "activation_function": "tanh", "label2id": {"a": 1}}, "label2id is"),
            ("bert", {"layers": 2, "activation_function": "tanh", "label2id": {"a": 0, "b": 1}}, "num_labels is 3"),
        ],
    )
    def test_a_head_of_another_form_is_told(self, kind, fields, told):
        with pytest.raises((Refused, Damaged), match=told):
            hub_heads.parse(*head_folder(kind, two_maps(), **fields), "x")

    def test_a_tensor_that_the_backbone_has_not_is_told(self):
        with pytest.raises(Refused, match=r"cls\.bias.*own class has not"):
            hub_heads.parse(*head_folder("bert", {"cls.bias": random(3)}), "x")

    @pytest.mark.parametrize(
        ("kind", "modules"),
        [
            ("bert", {"bert.pooler": {"dense": (16, 16)}, "classifier": {"": (3, 16)}}),
            ("roberta", {"classifier": {"dense": (16, 16), "out_proj": (3, 16)}}),
            ("xlm-roberta", {"classifier": {"dense": (16, 16), "out_proj": (3, 16)}}),
            ("electra", {"classifier": {"dense": (16, 16), "out_proj": (3, 16)}}),
        ],
    )
    def test_what_is_written_is_read_bit_for_bit(self, kind, modules):
        made = {}
        for path, maps in modules.items():
            for name, shape in maps.items():
                start = f"{name}." if name else ""
                made.setdefault(path, {})[f"{start}weight"] = random(*shape)
                made[path][f"{start}bias"] = random(shape[0])
        extra = {"other": {"weight": random(3)}}
        assert hub_heads.has_place({**made, **extra}, kind) == (made, ("other",))
        labels = ("no", "maybe", "yes")
        given = hub_heads.dump(made, "sst", "user/model", Target(kind, 16), labels)
        again = hub_heads.parse(given[hub_heads.CONFIG], given[hub_heads.WEIGHTS], "y")
        assert again.labels == labels
        assert {p: set(parts) for p, parts in again.modules.items()} == {p: set(parts) for p, parts in made.items()}
        assert all(torch.equal(again.modules[p][n], t) for p, parts in made.items() for n, t in parts.items())

    def test_a_classifier_that_might_read_anything_has_no_place(self):
        alone = {"classifier": {"weight": random(3, 16), "bias": random(3)}}
        assert hub_heads.has_place(alone, "bert") == ({}, ("classifier",))
        with pytest.raises(ValueError, match="no head for a bert with classifier"):
            hub_heads.dump(alone, "sst", None, Target("bert", 16), None)


def test_the_encoders_of_the_cases_have_all_their_blocks_adapted():
    found = adapterhub.parse(*folder(FIELDS, of("bert", FIELDS)), "x").adapter
    assert len(found.modules) == 2 * BLOCKS
    assert list(found.modules) == homes("bert")
