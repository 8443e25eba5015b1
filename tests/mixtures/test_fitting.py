"""Which gates go to which rows, against indexing by hand; devices of layers."""

import pytest
import torch
from family_cases import backbone

from mole.mixtures import placing
from mole.mixtures.fitting import Fit, fitted, pooling
from mole.mixtures.placing import batch_rows, on_devices
from mole.routing import Frame, Routing, RoutingInputs

B, T, E = 2, 5, 3


def gates(rows=B, tokens=T):
    return torch.rand(rows, tokens, E, generator=torch.Generator().manual_seed(0))


def fit(takes="features", **more):
    return Fit(site="here", num_experts=E, takes=takes, **more)


def weights(routing, x, how=None, frame=None, out=None):
    found, rows = fitted(routing, x, x if out is None else out, how or fit(), frame or Frame())
    return found.dense(E), rows


def masked(*lengths):
    mask = torch.tensor([[1] * length + [0] * (T - length) for length in lengths])
    return Frame(inputs=RoutingInputs(attention_mask=mask))


def test_tokens_spend_their_own_gates():
    g, x = gates(), torch.zeros(B, T, 4)
    found, rows = weights(Routing(g), x)
    assert torch.equal(found, g)
    assert rows is x


def test_further_axes_share_the_gates_of_their_token():
    g, x = gates(), torch.arange(B * T * 2 * 3 * 4.0).view(B, T, 2, 3, 4)
    found, rows = weights(Routing(g), x)
    assert torch.equal(rows.reshape(x.shape), x)
    assert torch.equal(found.expand(-1, 6, -1).reshape(B, T, 2, 3, E)[:, :, 1, 2], g)
    found, rows = weights(Routing(g[:, :1]), x)
    assert torch.equal(rows.reshape(x.shape), x)
    assert torch.equal(found, g[:, :1])


def test_a_flat_row_of_tokens_spends_their_gates_in_order():
    g = gates()
    found, rows = weights(Routing(g), torch.zeros(B * T, 4))
    assert torch.equal(found, g.reshape(1, B * T, E))
    assert rows.shape == (1, B * T, 4)


def test_a_flat_row_of_tokens_under_gates_of_examples():
    g = gates(tokens=1)
    assert torch.equal(weights(Routing(g), torch.zeros(B * T, 4))[0][0], g[:, 0].repeat_interleave(T, 0))


@pytest.mark.parametrize(
    ("pooled", "frame", "want"),
    [
        ("first", masked(5, 3), lambda g: g[:, 0]),
        ("last", masked(5, 3), lambda g: torch.stack([g[0, 4], g[1, 2]])),
        ("last", Frame(), lambda g: g[:, -1]),
        ("mean", masked(5, 3), lambda g: torch.stack([g[0].mean(0), g[1, :3].mean(0)])),
        ("mean", Frame(), lambda g: g.mean(1)),
    ],
    ids=["first", "last of a mask", "last", "mean of a mask", "mean"],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_one_vector_per_example_spends_pooled_gates(pooled, frame, want, sparse):
    g = gates()
    routing = Routing(g)
    if sparse:
        ids = torch.tensor([2, 0]).expand(B, T, 2)
        routing = Routing(g[..., [2, 0]], ids)
        g = g * torch.tensor([1.0, 0.0, 1.0])
    found, rows = weights(routing, torch.zeros(B, 4), fit(pooled=pooled), frame)
    torch.testing.assert_close(found, want(g)[None])
    assert rows.shape == (1, B, 4)


def test_left_padding_leaves_the_last_token_the_last():
    g = gates()
    frame = Frame(inputs=RoutingInputs(attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])))
    assert torch.equal(weights(Routing(g), torch.zeros(B, 4), fit(pooled="last"), frame)[0][0], g[:, -1])


def test_a_mask_over_the_cached_tokens_too_counts_for_the_new_ones():
    g = gates(tokens=2)
    frame = Frame(inputs=RoutingInputs(attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])))
    want = torch.stack([g[0, 0], g[1, 1]])
    assert torch.equal(weights(Routing(g), torch.zeros(B, 4), fit(pooled="last"), frame)[0][0], want)


def test_ids_and_positions_that_all_examples_share():
    g, ids = gates(), torch.arange(T)[None]
    found, rows = weights(Routing(g), ids, fit("ids"), out=torch.zeros(1, T, 4))
    assert torch.equal(found, g)
    assert torch.equal(rows, ids.expand(B, -1))


def test_channels_spend_one_gate_per_example_or_where_pointwise_one_per_position():
    g = gates()
    assert torch.equal(weights(Routing(g), torch.zeros(B, 4, T), fit("channels", pointwise=True))[0], g)
    found = weights(Routing(g), torch.zeros(B, 4, T), fit("channels"))[0]
    torch.testing.assert_close(found, g.mean(1, keepdim=True))
    found = weights(Routing(g), torch.zeros(B, 4, 9), fit("channels", pointwise=True))[0]
    torch.testing.assert_close(found, g.mean(1, keepdim=True))


@pytest.mark.parametrize("keep", [2, 0, torch.tensor([3, 1, 1])], ids=str)
def test_the_head_sees_the_positions_that_are_kept(keep):
    g = gates()
    want = g[:, -keep:] if isinstance(keep, int) else g[:, keep]
    frame = Frame(logits_to_keep=keep)
    x = torch.zeros(B, want.shape[1], 4)
    assert torch.equal(weights(Routing(g), x, fit(is_head=True), frame)[0], want)
    ids = torch.tensor([2, 0, 1]).expand(B, T, 3)
    assert torch.equal(weights(Routing(g, ids), x, fit(is_head=True), frame)[0], want[..., [1, 2, 0]])


@pytest.mark.parametrize(
    ("x", "how"),
    [
        (torch.zeros(B, T + 1, 4), fit()),
        (torch.zeros(B + 1, T, 4), fit()),
        (torch.zeros(7, 4), fit()),
        (torch.zeros(B, T + 1, 2, 4), fit()),
        (torch.zeros(B, T + 1), fit("ids")),
        (torch.zeros(B + 1, 4, T), fit("channels")),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else value.takes,
)
def test_rows_that_no_gates_belong_to_are_an_error_with_layer_and_both_shapes(x, how):
    with pytest.raises(ValueError, match="here") as error:
        weights(Routing(gates()), x, how)
    assert str(tuple(x.shape)) in str(error.value)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("vit", "mean"),
        ("bert", "first"),
        ("roberta classifies", "first"),
        ("llama classifies", "last"),
        ("gpt2", "last"),
    ],
)
def test_pooling_goes_by_how_the_backbone_reads(name, want):
    assert pooling(backbone(name), "auto") == want
    assert pooling(backbone(name), "first") == "first"


def test_a_routing_is_copied_to_a_device_once(monkeypatch):
    moves = []
    inner = placing._moved
    monkeypatch.setattr(placing, "_moved", lambda routing, device: moves.append(device.type) or inner(routing, device))
    shared, own = Routing(gates()), Routing(gates(), torch.zeros(B, T, E, dtype=torch.int64))
    devices = {"a": "cpu", "b": "meta", "c": "meta", "d": "meta"}
    found = on_devices(
        {"a": shared, "b": shared, "c": shared, "d": own}, {site: torch.device(d) for site, d in devices.items()}
    )
    assert sorted(moves) == ["cpu", "meta", "meta"]
    assert found["a"] is shared
    assert found["b"] is found["c"]
    assert (
        found["b"].weights.device.type == found["d"].weights.device.type == found["d"].expert_ids.device.type == "meta"
    )


def test_the_rows_of_a_batch_are_those_of_its_inputs():
    assert batch_rows({"pixel_values": torch.zeros(4, 3, 8, 8)}) == 4
    assert batch_rows({"attention_mask": torch.zeros(9, 1), "inputs_embeds": torch.zeros(3, 1, 2)}) == 3
    with pytest.raises(ValueError, match="needs one of input_ids"):
        batch_rows({"attention_mask": torch.zeros(9, 1)})
