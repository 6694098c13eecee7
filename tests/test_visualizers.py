"""Pictures of predictions: drawing against naive code, files, odd input; the explorer as a function and headless."""
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.core.types import Prediction, Predictions
from anomnb.visualizers.draw import (
    clip_text,
    colour,
    contour,
    draw_contours,
    draw_predictions,
    fit_mask,
    grid,
    label_bar,
    message,
    overlay,
    to_png,
)
from anomnb.visualizers.heatmap import HeatmapPictures, State, choose, explore_heatmap, filmstrip, list_decisions, measure_moves
from anomnb.visualizers.image import ImageVisualizer, shared_scale, show, view_of


@pytest.fixture(scope="module")
def drawn():
    return draw_predictions(14, size=96)


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# drawing

def naive_contour(region):
    h, w = region.shape
    out = np.zeros_like(region)
    for y, x in zip(*np.nonzero(region)):
        around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        out[y, x] = any(not (0 <= a < h and 0 <= b < w) or not region[a, b] for a, b in around)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_contour_is_the_8_neighbour_boundary(seed):
    region = np.random.default_rng(seed).random((17, 23)) > 0.35
    assert (contour(region) == naive_contour(region)).all()


def test_contour_of_nothing_is_nothing():
    empty = np.zeros((20, 30), bool)
    assert not contour(empty).any()
    image = np.full((20, 30, 3), 99, np.uint8)
    out = draw_contours(image, empty)
    assert (out == image).all() and out is not image


def test_outline_leaves_a_small_region_visible():
    image, region = np.full((64, 64, 3), 99, np.uint8), np.zeros((64, 64), bool)
    region[30, 30] = True
    out = draw_contours(image, region)
    assert (out[30, 30] == 99).all() and (out != 99).any()


def test_overlay_agrees_with_floating_point():
    r = np.random.default_rng(0)
    image, map = r.integers(0, 256, (31, 17, 3), dtype=np.uint8), r.random((31, 17)).astype(np.float32)
    exact = image*0.5 + colour(map, 0, 1)*0.5
    assert np.abs(overlay(image, map, 0.5, 0, 1, fade=0) - exact).max() <= 1  # whole numbers, and alpha in steps of 1/256


def test_colour_takes_any_map():
    map = np.array([[np.nan, np.inf, -np.inf, 0.5]])
    out = colour(map, 0, 1)
    ends = colour(np.array([[1.0, 0.0]]), 0, 1)
    assert (out[0, 0] == 128).all() and (out[0, 1:3] == ends[0]).all()
    assert (colour(np.full((2, 2), 3.0), 3, 3) == ends[0, 1]).all()
    with pytest.raises(AnomnbError, match="viridis"):
        colour(map, 0, 1, "viridiss")


@pytest.mark.parametrize("size", [(7, 9), (100, 40), (300, 500)])
def test_masks_lose_no_region(size):
    mask = np.zeros((120, 130), np.int32)
    mask[60, 70], mask[5] = 3, -1
    assert fit_mask(mask, size).any() and fit_mask(mask, size).shape == size
    assert not fit_mask(np.minimum(mask, 0), size).any()


def test_sheets_and_letters():
    a, b = np.zeros((10, 20, 3), np.uint8), np.zeros((30, 5, 3), np.uint8)
    assert grid([a, b, a], columns=2, gap=4).shape == (30 + 4 + 10, 20 + 4 + 5, 3)
    assert grid([a], columns=3).shape == a.shape and grid([a, b], gap=0).shape == (40, 20, 3)
    with pytest.raises(AnomnbError, match="at least one"):
        grid([])
    assert clip_text("long/" * 40 + "end.png", 80).endswith("end.png") and clip_text("abc", 1) == ""
    assert label_bar("x", 0).shape == (22, 1, 3) and message("word " * 300, (40, 60)).shape == (40, 60, 3)


# predictions as pictures

@pytest.mark.parametrize("size", [(40, 60), (3000, 200), (1, 900), (8, 8)])
def test_any_size_of_image_becomes_a_panel(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    raw = np.random.default_rng(1).random((32, 32)).astype(np.float32)
    p = Prediction(0, "a.png", size, 0.9, raw, True, 0.5, 0.5, mask=np.ones(size, np.int32), label=1, loader=lambda: image)
    v = view_of(p, 200)
    assert max(v.image.shape) == 200 and v.map.shape == v.truth.shape == v.image.shape[:2]
    out = ImageVisualizer(side=200).render(p)
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[1] >= 360


def test_mixed_sizes_share_a_sheet(drawn):
    small = Prediction(1, "b.png", (20, 50), 0.1, None, loader=lambda: np.zeros((20, 50, 3), np.uint8))
    assert isinstance(show([drawn[0], small, drawn[2]], columns=2, side=100), Image.Image)


def test_what_is_missing_is_said(drawn):
    look, p = ImageVisualizer(side=220), drawn[2]
    full = look.render(p)
    others = [replace(p, loader=None), replace(p, raw_map=None), replace(p, mask=None),
              replace(p, is_anomalous=None, threshold=None, map_threshold=None),
              replace(p, error="the file is empty", score=None, raw_map=None, mask=None, size=None)]
    pictures = [look.render(o).tobytes() for o in others]
    assert len({full.tobytes(), *pictures}) == 6

    def gone():
        raise FileNotFoundError("no such file: crack/002.png")
    assert "no such file" in view_of(replace(p, loader=gone), 64).gone
    assert "was not kept" in view_of(replace(p, loader=None), 64).gone


def test_options_change_the_picture(drawn):
    plain = ImageVisualizer(side=100).render(drawn[2])
    for kw in [dict(opacity=0.2), dict(cmap="gray"), dict(scale="own"), dict(panels=("contours",)), dict(side=90)]:
        assert ImageVisualizer(**{"side": 100, **kw}).render(drawn[2]).tobytes() != plain.tobytes(), kw
    for kw in [dict(opacity=2), dict(scale="each"), dict(panels=["image", "map"])]:
        with pytest.raises(AnomnbError):
            ImageVisualizer(**kw)


def test_files_are_safe_unique_and_ranked(drawn, tmp_path):
    odd = ["../../etc/passwd", "a/ü ö?*.png", "C:\\parts\\x.png", "same.png", "same.png", "", "n" * 300 + ".png", "https://host/p.png?a=b&c"]
    some = [replace(p, source=s) for p, s in zip(drawn, odd)]
    paths = ImageVisualizer(side=40).save(some, tmp_path / "pictures", quiet=True)
    assert len({p.name.lower() for p in paths}) == len(odd) and all(p.parent == tmp_path / "pictures" and p.is_file() for p in paths)
    assert sorted(paths) == paths
    best = max(some, key=lambda p: p.score)
    assert (np.asarray(Image.open(paths[0])) == ImageVisualizer(side=40).render(best, shared_scale(some))).all()
    assert len(ImageVisualizer(side=40).save(some, tmp_path / "few", n=2, quiet=True)) == 2
    assert ImageVisualizer().save([], tmp_path / "none", quiet=True) == []


def test_scale_is_robust(drawn):
    low, high = shared_scale(drawn)
    values = np.concatenate([p.raw_map.ravel() for p in drawn])
    assert values.min() < low < high <= values.max()
    wild = [replace(drawn[0], raw_map=np.full((4, 4), v, np.float32)) for v in (np.nan, np.inf)]
    assert np.isfinite(shared_scale([*drawn, *wild])).all()
    assert shared_scale(wild[:1]) == (0.0, 1.0)


def test_predictions_show_themselves(drawn):
    assert isinstance(drawn.worst(2), Image.Image) and isinstance(drawn.show(2), Image.Image)
    with pytest.raises(AnomnbError, match="no predictions to show"):
        Predictions([]).worst()


# the explorer as a function

CHANGES = dict(image=6, opacity=0.25, cmap="viridis", scale="own", threshold=1.2, truth=False)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_picture(drawn, field):
    frames, state = HeatmapPictures(drawn, 128), State(image=2, threshold=1.5)
    before = frames.render(state)
    assert frames.render(replace(state, **{field: CHANGES[field]})) != before
    assert HeatmapPictures(drawn, 128).render(state) == before
    assert decode(before).shape == (128 + 26, 128, 3)


def test_states_are_frozen():
    assert {State(): 1}[State()] == 1
    with pytest.raises(AttributeError):
        State().opacity = 1


def test_filters(drawn):
    scores = [drawn[i].score for i in choose(drawn)]
    assert scores == sorted(scores, reverse=True) and len(scores) == len(drawn)
    found, good = (set(choose(drawn, decision=d)) for d in ("anomalous", "good"))
    assert found | good == set(range(len(drawn))) and not found & good
    wrong = {i for i, p in enumerate(drawn) if bool(p.label) != p.is_anomalous}
    assert set(choose(drawn, decision="wrong")) == wrong
    assert set(choose(drawn, "crack", "anomalous")) == {i for i in found if drawn[i].kind == "crack"}
    undecided = [replace(p, is_anomalous=None) for p in drawn]
    assert list_decisions(undecided) == ["all"] and len(choose(undecided)) == len(drawn) and choose(undecided, decision="good") == []
    assert list_decisions([replace(p, label=None) for p in drawn]) == ["all", "anomalous", "good"]


def test_filmstrip_of_anything(drawn):
    assert filmstrip(drawn, side=64).size[0] == 4*64 + 3*8
    explorer = explore_heatmap(drawn, side=64)
    assert filmstrip(explorer, [explorer.state], side=64).size == (64, 64 + 26 + 22)
    flat = [replace(p, raw_map=None) for p in drawn]
    assert filmstrip(flat, side=64).size[0] == 64


@pytest.mark.parametrize("nothing", [[], [Prediction(0, "a.png", error="the file is empty")]])
def test_nothing_to_explore(nothing):
    with pytest.raises(AnomnbError, match="Predict on a folder"):
        explore_heatmap(nothing)


# the explorer without a browser

def test_each_control_changes_the_picture(drawn):
    e = explore_heatmap(drawn, side=128)
    for control, value in [(e.opacity, 0.3), (e.cmap, "inferno"), (e.scale, "own"), (e.threshold, 1.2), (e.truth, False),
                           (e.picker, e.picker.options[3][1]), (e.kind, "stain"), (e.kind, "good"), (e.decision, "wrong")]:
        before = e.picture.value
        control.value = value
        assert e.picture.value != before, control.description
        assert e.picture.value == e.render(e.state)


def test_titles_follow(drawn):
    e = explore_heatmap(drawn, side=64)
    assert drawn[choose(drawn)[0]].source[6:] in e.title.value and "anomalous" in e.title.value and "region" in e.facts.value
    e.kind.value = "good"
    assert "good/0" in e.title.value
    e.decision.value = "wrong"
    assert e.state.image is None and "no image" in e.title.value and e.facts.value == ""
    e.decision.value, e.kind.value = "all", "all kinds"
    assert e.state.image == choose(drawn)[0] and len(e.picker.options) == len(drawn)


def test_the_threshold_follows_the_category(drawn):
    e = explore_heatmap([drawn[6], replace(drawn[2], map_threshold=1.1)], side=64)
    assert e.state.threshold == 1.4
    e.picker.value = 1
    assert e.state.threshold == 1.1
    e.threshold.value = 1.3
    e.opacity.value = 0.1
    assert e.state.threshold == 1.3


def test_odd_predictions_can_be_explored(drawn):
    p = drawn[2]
    maps = [np.full((8, 8), v, np.float32) for v in (np.nan, 0.0)]
    odd = [replace(p, raw_map=None), replace(p, loader=None), replace(p, mask=None), replace(p, raw_map=maps[0]), replace(p, score=None),
           replace(p, raw_map=maps[1]), replace(p, error="broken", score=None), replace(p, map_threshold=99.0)]
    e = explore_heatmap(odd, side=64)
    assert e.left_out == 1 and len(e.predictions) == 7
    pictures = set()
    for _, place in e.picker.options:
        e.picker.value = place
        pictures.add(e.picture.value)
    assert len(pictures) >= 5
    assert explore_heatmap([odd[0]], side=64).threshold.disabled


def test_it_shows_itself(drawn):
    bundle = explore_heatmap(drawn, side=64)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "image/png" in bundle
    assert type(drawn.explore()).__name__ == "HeatmapExplorer"


def test_moves_are_timed(drawn):
    e = explore_heatmap(drawn, side=64)
    pictures = []
    e.picture.observe(lambda c: pictures.append(c["new"]), "value")
    assert len(measure_moves(e, 16)) == 16 and len(pictures) >= 16  # every move drew something new


def test_png_is_lossless_and_the_same_twice():
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    assert to_png(picture) == to_png(picture) and (decode(to_png(picture, 6)) == picture).all()
