"""Pictures of blocks: what they show is what was routed, each patch once for each of its experts."""

import matplotlib
import numpy as np
import pytest
import torch
from surgery_cases import Patches, Prefixed
from torch import nn

pytest.importorskip("matplotlib")

from mole.figure import MissingExtra, png
from mole.moe import (
    MoEBlock,
    MoEConfig,
    MoERouterConfig,
    display_abs_experts_load,
    display_experts_load,
    image_through_experts,
    image_through_moe_block,
    make_expert_mask,
    make_experts_masks,
)
from mole.moe.images import as_images, prefix_tokens

PATCH, WIDTH = 4, 12


class LinearMoE(MoEBlock):
    """As MoEfy's page has it."""

    def __init__(self, input_dim, output_dim, num_experts, *args, **kwargs):
        experts = [nn.Linear(input_dim, output_dim) for _ in range(num_experts)]
        super().__init__(input_dim=input_dim, experts=experts, *args, **kwargs)  # noqa: B026  (their way of calling it)

    def expert_forward(self, expert, x):
        return expert(x)


def block(experts=3, **settings):
    return LinearMoE(input_dim=WIDTH, output_dim=WIDTH, num_experts=experts, **settings)


def vision(*layers, prefix=0):
    torch.manual_seed(0)
    start = [Patches(PATCH), nn.Linear(PATCH * PATCH * 3, WIDTH)]
    return nn.Sequential(*start, *([Prefixed(prefix, WIDTH)] if prefix else []), *layers)


def picture(height=12, width=20, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def bars(axes):
    return [patch.get_height() for patch in axes.patches]


def texts(figure):
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("experts", [1, 3, 4, 9])
def test_bars_are_the_loads_one_axis_per_expert_on_one_scale(experts):
    model = block(experts, k=1, hole=True, layer_id=7)
    model(torch.randn(5, 9, WIDTH))
    figure = display_experts_load(model)
    loads = model.experts_load()
    assert len(figure.axes) == experts + 1
    for axes, row in zip(figure.axes, loads, strict=True):
        assert bars(axes) == row.tolist()
    assert sum(sum(bars(axes)) for axes in figure.axes) == 5 * 9
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[-1].get_title(loc="left").startswith("hole (zero)")
    assert texts(figure)[0] == "LinearMoE 7"
    assert png(figure)[:4] == b"\x89PNG"


def test_totals_have_percentages_and_the_hole_its_own_colour():
    model = block(3, hole=True)
    model(torch.randn(4, 6, WIDTH))
    figure = display_abs_experts_load(model, model.experts_load())
    (axes,) = figure.axes
    loads = model.abs_experts_load()
    assert bars(axes) == loads.tolist()
    labels = [text.get_text() for text in axes.texts if "%" in text.get_text()]
    assert labels == [f"{share:.1%}" for share in (loads / 24).tolist()]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert len(set(colours)) == 4
    red, green, blue, _ = colours[-1]
    assert red == green == blue
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["expert 0", "expert 1", "expert 2", "hole (zero)"]


def test_loads_may_come_with_a_title_alone():
    loads = np.array([[1, 2, 3], [3, 2, 1]])
    assert texts(display_experts_load("layer 3", loads))[0] == "layer 3"
    figure = display_abs_experts_load("layer 3", torch.tensor([5, 1]), names=["left", "right"])
    assert bars(figure.axes[0]) == [5, 1]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["left", "right"]
    for given, told in [
        (("layer 3",), "loads are missing"),
        (("layer 3", np.zeros(3)), r"counts \[experts, positions\], got \[3\]"),
        ((block(3), np.zeros((2, 4))), "loads of 2 experts, and 3 experts"),
    ]:
        with pytest.raises(ValueError, match=told):
            display_experts_load(*given)
    with pytest.raises(RuntimeError, match="no forward yet"):
        display_experts_load(block())


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (8, 8)])
def test_every_patch_is_painted_once_for_each_of_its_experts(prefix, k, height, width):
    moe = block(4, k=k, hole=True)
    model = vision(moe, prefix=prefix).eval()
    model(torch.from_numpy(picture(height, width)).permute(2, 0, 1)[None])
    masks = make_experts_masks(moe, (height, width), PATCH, num_prefix_tokens=prefix)
    assert masks.shape == (5, height, width)
    assert (masks.sum(0) == k).all()
    chosen = moe.batched_routing_matrix[0, prefix:] > 0
    columns = width // PATCH
    for patch, row in enumerate(chosen):
        top, left = patch // columns * PATCH, patch % columns * PATCH
        inside = masks[:, top : top + PATCH, left : left + PATCH]
        assert (inside == row.numpy()[:, None, None]).all()


def test_panels_show_the_pixels_of_the_patches_that_an_expert_got():
    moe = block(3)
    model = vision(moe, prefix=1).train()
    image = picture()
    figures = image_through_experts(image, model, PATCH)
    assert list(figures) == ["LinearMoE"]
    masks = make_experts_masks(moe, (12, 20), PATCH, num_prefix_tokens=1)
    axes = figures["LinearMoE"].axes
    assert len(axes) == 3
    for each, mask in zip(axes, masks, strict=True):
        drawn = each.images[0].get_array()
        assert np.allclose(drawn[mask == 1], image[mask == 1])
        assert (np.asarray(drawn)[mask == 0] >= 0.85).all()
        assert f"{mask.mean():.1%}" in each.get_title(loc="left")
    assert all(module.training for module in model.modules())
    assert not moe.observers


def test_all_blocks_are_drawn_in_order_of_execution_and_one_used_twice_twice():
    late, twice = block(2, layer_id="late"), block(2, layer_id="twice")
    model = vision(twice, nn.Linear(WIDTH, WIDTH), late, twice)
    assert list(image_through_experts(picture(), model, PATCH)) == ["twice", "late", "twice (2)"]
    unnamed = vision(block(2), block(2))
    assert list(image_through_experts(picture(), unnamed, PATCH)) == ["LinearMoE, 2", "LinearMoE, 3"]


def test_several_images_make_a_row_each():
    moe = block(3, k=2)
    model = vision(moe)
    images = [picture(seed=seed) for seed in range(2)]
    (figure,) = image_through_experts(images, model, PATCH).values()
    assert len(figure.axes) == 6
    for row, image in enumerate(images):
        masks = make_experts_masks(moe, (12, 20), PATCH, row=row)
        for axes, mask in zip(figure.axes[3 * row : 3 * row + 3], masks, strict=True):
            assert np.allclose(axes.images[0].get_array()[mask == 1], image[mask == 1])
    batch = np.stack(images)
    assert list(image_through_experts(batch, model, PATCH)) == ["LinearMoE"]
    with pytest.raises(ValueError, match="images of one size are needed"):
        image_through_experts([picture(), picture(8, 8)], model, PATCH)


def test_experts_that_choose_may_take_a_patch_any_number_of_times():
    moe = block(3, expert_choice=True, k=4)
    image_through_experts(picture(), vision(moe), PATCH)
    masks = make_experts_masks(moe, (12, 20), PATCH)
    assert (masks.sum((1, 2)) == 4 * PATCH * PATCH).all()


def test_whole_images_go_one_way():
    moe = MoEBlock([nn.Conv2d(3, 3, 1) for _ in range(3)], route="images")
    (figure,) = image_through_experts(picture(), nn.Sequential(moe), PATCH).values()
    masks = make_experts_masks(moe, (12, 20), PATCH)
    assert sorted(masks.mean((1, 2)).tolist()) == [0, 0, 1]
    assert len(figure.axes) == 3


@pytest.mark.parametrize(
    ("made", "first"),
    [
        (lambda image: image, 1.0),
        (lambda image: image.transpose(2, 0, 1), 1.0),
        (lambda image: torch.from_numpy(image), 1.0),
        (lambda image: torch.from_numpy(image).permute(2, 0, 1), 1.0),
        (lambda image: (image * 255).round().astype(np.uint8), 1.0),
        (lambda image: np.concatenate([image, np.ones((12, 20, 1), np.float32)], -1), 1.0),
        (lambda image: image[..., 0], None),
        (lambda image: image[None, ..., 0], None),
    ],
    ids=["HWC", "CHW", "tensor HWC", "tensor CHW", "bytes", "RGBA", "grey", "1HW"],
)
def test_images_come_in_many_forms(made, first):
    image = picture()
    found = as_images(made(image))
    assert found.shape == (1, 12, 20, 3)
    assert found.dtype == np.float32
    wanted = image if first else np.repeat(image[..., :1], 3, axis=-1)
    assert np.allclose(found[0], wanted, atol=0.5 / 255 + 1e-6)


def test_what_is_no_image_or_does_not_fit_is_refused():
    model = vision(block())
    for image, settings, told in [
        (np.zeros((12, 20, 5)), {}, r"an image is .* got \[12, 20, 5\]"),
        (np.zeros((12, 20, 3), dtype=np.int64), {}, "bytes .uint8. or floats, got int64"),
        (picture(12, 20), {"patch_size": 5}, "12 × 20 pixels is no whole number of patches of 5"),
        (picture(16, 16), {"patch_size": 2}, "16 tokens and 8 × 8 = 64 patches do not fit together"),
        (picture(), {"num_prefix_tokens": 1}, "num_prefix_tokens=1: 15 tokens without them are not the 3 × 5 = 15"),
        (picture(), {"backend": "plotlib"}, "unknown backend 'plotlib'; did you mean"),
    ]:
        with pytest.raises(ValueError, match=told):
            image_through_experts(image, model, **{"patch_size": PATCH, **settings})
    with pytest.raises(ValueError, match="has no MoE block"):
        image_through_experts(picture(), nn.Linear(2, 2), PATCH)
    with pytest.raises(RuntimeError, match="no forward yet"):
        make_experts_masks(block(), (8, 8), PATCH)


def test_prefix_tokens_are_what_is_left_over_up_to_eight():
    assert [prefix_tokens(15 + extra, (3, 5), "auto") for extra in (0, 1, 8)] == [0, 1, 8]
    for tokens in (14, 24):
        with pytest.raises(ValueError, match=f"{tokens} tokens and 3 × 5 = 15 patches"):
            prefix_tokens(tokens, (3, 5), "auto")


def test_one_mask_has_its_patches_row_by_row():
    mask = make_expert_mask([1, 3], (4, 6), 2)
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 0, 0, 0, 0]] * 2
    with pytest.raises(ValueError, match="patch 6: an image of 2 × 3 patches has 0 … 5"):
        make_expert_mask([6], (4, 6), 2)


def test_preprocess_says_what_the_model_sees_and_what_is_drawn():
    moe = block(2)
    model = vision(moe)
    (figure,) = image_through_experts(
        picture(30, 50), model, PATCH, preprocess=lambda image: (image[:, :8, :12] - 0.5) / 0.25
    ).values()
    assert make_experts_masks(moe, (8, 12), PATCH).shape == (2, 8, 12)
    assert figure.axes[0].images[0].get_array().shape == (8, 12, 3)
    alone = image_through_moe_block(picture(8, 12), moe, PATCH)
    assert len(alone.axes) == 2


def test_pictures_need_no_window_and_leave_matplotlib_as_it_is(tmp_path):
    before = dict(matplotlib.rcParams)
    for figure in image_through_experts(picture(), vision(block(2)), PATCH).values():
        figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before


def test_plotly_is_an_extra():
    model = vision(block(2))
    try:
        import plotly  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="needs plotly, which is not installed"):
            image_through_experts(picture(), model, PATCH, backend="plotly")
        return
    (figure,) = image_through_experts(picture(), model, PATCH, backend="plotly").values()
    assert len(figure.data) == 2


def test_soft_and_deep_blocks_are_drawn_too():
    soft = block(3, config=MoEConfig(router=MoERouterConfig(name="soft")))
    deep = block(1, config=MoEConfig(router=MoERouterConfig(name="depth", capacity_factor=0.4)))
    figures = image_through_experts(picture(), vision(soft, deep), PATCH)
    assert len(figures) == 2
    assert make_experts_masks(deep, (12, 20), PATCH).sum() == 6 * PATCH * PATCH


def test_the_even_share_is_told_inside_the_picture():
    moe = block(5, hole=True)
    moe(torch.randn(2, 9, WIDTH))
    figure = display_abs_experts_load(moe)
    png(figure)
    (even,) = [text for text in figure.axes[0].texts if text.get_text() == "even"]
    assert even.get_window_extent().x1 <= figure.bbox.x1
