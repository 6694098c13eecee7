"Drawn defects: exact masks, the published sizes, noise against its definition, one seed one picture"
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.core.seeds import rng
from anomnb.data import synthetic
from anomnb.data.synthetic import (
    CHANGES,
    DEFECTS,
    TEXTURES,
    VISIBLE,
    Textures,
    augment,
    blend_texture,
    cut_paste,
    cut_paste_scar,
    drawn_source,
    keep_visible,
    perlin,
    perlin_mask,
    stain,
    synthesise,
    texture,
)
from anomnb.data.toy import draw_good

SIZES = [(64, 64), (50, 90), (90, 37), (17, 64)]
TILE = draw_good(0, "synthetic", 0, 96).astype(np.float32)/255


def noisy(size, seed=0): return rng(seed, "noisy").random((*size, 3), np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", DEFECTS)
def test_masks_are_exact(kind, size):
    for i in range(8):
        image = noisy(size, i) if i % 2 else np.ascontiguousarray(TILE[:size[0], :size[1]])
        before = image.copy()
        drawn, mask = synthesise(rng(i, kind), image, kind)
        assert drawn.dtype == np.float32 and drawn.shape == (*size, 3) and mask.dtype == bool and mask.shape == size
        assert np.array_equal(image, before) and 0 <= drawn.min() and drawn.max() <= 1
        assert np.array_equal(mask, (drawn != image).any(-1)) and mask.any() and not mask.all()
        assert np.abs(drawn - image).max(-1)[mask].min() >= VISIBLE


def oracle(size, cells, turn):
    "Gradient noise pixel by pixel; `turn` holds the angle at each corner of the grid"
    out = np.zeros(size)
    fade = lambda t: 6*t**5 - 15*t**4 + 10*t**3
    for r in range(size[0]):
        for c in range(size[1]):
            y, x = (r + 0.5)*cells[0]/size[0], (c + 0.5)*cells[1]/size[1]
            for i in (int(y), int(y) + 1):
                for j in (int(x), int(x) + 1):
                    slope = np.sin(turn[i, j])*(y - i) + np.cos(turn[i, j])*(x - j)
                    out[r, c] += slope*(1 - fade(abs(y - i)))*(1 - fade(abs(x - j)))
    return out*np.sqrt(2)


@pytest.mark.parametrize("size,cells", [((20, 33), (3, 5)), ((16, 16), (1, 1)), ((31, 12), (8, 2))])
def test_perlin_is_gradient_noise(size, cells):
    turn = rng(4).uniform(0, 2*np.pi, (cells[0] + 1, cells[1] + 1))
    np.testing.assert_allclose(perlin(rng(4), size, cells), oracle(size, cells, turn), atol=1e-5)  # float32


def test_perlin_turned():
    "Any angle stays in range and fills the picture; a quarter turn of long cells makes them lie the other way"
    for angle in (-90, -37.5, 12, 90, 180):
        noise = perlin(rng(1), (40, 70), (3, 9), angle)
        assert noise.shape == (40, 70) and noise.dtype == np.float32 and np.isfinite(noise).all() and np.abs(noise).max() <= 1
        assert all(np.abs(o).max() > 0.01 for o in (noise[:6, :6], noise[-6:, :6], noise[:6, -6:], noise[-6:, -6:]))
    rough = lambda n: (np.abs(np.diff(n, axis=0)).mean(), np.abs(np.diff(n, axis=1)).mean())
    lying, standing = rough(perlin(rng(1), (64, 64), (16, 2))), rough(perlin(rng(1), (64, 64), (16, 2), 90))
    assert lying[0] > 2*lying[1] and standing[1] > 2*standing[0]


def test_perlin_masks():
    masks = [perlin_mask(rng(0, i), (128, 128)) for i in range(60)]
    assert all(m.any() and m.dtype == bool for m in masks) and 0.01 < np.mean([m.mean() for m in masks]) < 0.15
    assert perlin_mask(rng(0), (128, 128), threshold=0).mean() > 0.3
    assert perlin_mask(rng(0), (5, 3)).shape == (5, 3)
    with pytest.raises(AnomnbError, match="such as 0.5"):
        perlin_mask(rng(0), (32, 32), threshold=1)


def test_cells_are_powers_of_two(monkeypatch):
    seen = []
    monkeypatch.setattr(synthetic, "perlin", lambda g, size, cells, angle: seen.append((*cells, angle)) or np.ones(size))
    for i in range(300):
        perlin_mask(rng(i), (256, 512))
    rows, cols, angles = map(np.array, zip(*seen))
    assert set(rows) == {1, 2, 4, 8, 16, 32} and set(cols) == {1, 2, 4, 8, 16, 32, 64}
    assert -90 <= angles.min() < -80 and 80 < angles.max() <= 90


def test_blend():
    source, mask = noisy((96, 96), 1), rng(0).random((96, 96)) < 0.3
    drawn, changed = blend_texture(TILE, source, mask, 0.4)
    np.testing.assert_allclose(drawn[changed], 0.6*TILE[changed] + 0.4*source[changed], atol=1e-6)
    assert not (changed & ~mask).any() and changed.sum() > 0.97*mask.sum()
    assert not blend_texture(TILE, TILE, mask)[1].any()


def test_a_folder_of_textures(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "augment", lambda g, x: x)
    (tmp_path / "dotted").mkdir()
    for name, size, colour in (("a.png", (40, 30), (255, 0, 0)), ("dotted/b.png", (20, 90), (0, 255, 0))):
        Image.new("RGB", size, colour).save(tmp_path / name)
    shades = {tuple(Textures(str(tmp_path))(rng(i), (20, 30)).mean((0, 1)).tolist()) for i in range(20)}
    assert shades == {(1, 0, 0), (0, 1, 0)} and Textures(tmp_path)(rng(0), (20, 30)).shape == (20, 30, 3)
    black = np.zeros((64, 64, 3), np.float32)
    drawn, mask = texture(rng(0), black, Textures(tmp_path))
    assert mask.any() and len({tuple(o) for o in drawn[mask].tolist()}) == 1 and sorted(drawn[mask][0].tolist())[:2] == [0, 0]
    for where, words in ((tmp_path / "missing", "no folder"), (tmp_path / "a.png", "is a file")):
        with pytest.raises(AnomnbError, match=f"{words}.*leave `sources` out"):
            Textures(where)


def test_cut_paste_sizes():
    areas, aspects, image = [], [], noisy((200, 200))
    for i in range(300):
        ys, xs = np.nonzero(cut_paste(rng(i), image)[1])
        h, w = np.ptp(ys) + 1, np.ptp(xs) + 1
        areas.append(h*w/200**2)
        aspects.append(h/w)
    assert 0.019 < min(areas) < 0.03 and 0.14 < max(areas) < 0.151  # whole pixels
    assert 0.29 < min(aspects) < 0.36 and 2.9 < max(aspects) < 3.4
    assert abs(np.mean(np.array(aspects) > 1) - 0.5) < 0.1


def test_cut_paste_moves_what_was_there(monkeypatch):
    monkeypatch.setattr(synthetic, "_jitter", lambda g, x: x)
    image = noisy((60, 80))
    for draw in (cut_paste, cut_paste_scar):
        drawn, mask = draw(rng(2), image)
        there = {tuple(o) for o in image.reshape(-1, 3).tolist()}
        assert all(tuple(o) in there for o in drawn[mask].tolist())


def test_scars_are_thin():
    image = noisy((256, 256))
    sizes = [cut_paste_scar(rng(i), image)[1].sum() for i in range(100)]
    assert 10 < min(sizes) and max(sizes) < 1.05*16*25


def test_stain_is_soft():
    drawn, mask = stain(rng(1), np.full((96, 96, 3), 0.5, np.float32))
    change = np.abs(drawn - 0.5).max(-1)
    assert change[mask].min() < 0.25*change.max() and len(np.unique(change[mask])) > 50


@pytest.mark.parametrize("kind", TEXTURES)
def test_textures(kind):
    for i, size in enumerate(SIZES):
        a = drawn_source(rng(i), size, kind)
        assert a.shape == (*size, 3) and a.dtype == np.float32 and 0 <= a.min() and a.max() <= 1 and a.std() > 0.01
    assert np.array_equal(drawn_source(rng(3), (64, 64), kind), drawn_source(rng(3), (64, 64), kind))


def test_sources_vary():
    many = np.stack([drawn_source(rng(i), (48, 48)) for i in range(60)])
    assert many.mean((1, 2)).std(0).min() > 0.1 and many.std((1, 2, 3)).std() > 0.02


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change):
    image = drawn_source(rng(0), (40, 56), "cells")
    for i in range(5):
        out = change(rng(i), image).clip(0, 1)
        assert out.shape == image.shape and np.isfinite(out).all()
    assert np.abs(out - image).max() > 0.01
    flat = change(rng(0), np.full((16, 16, 3), 0.5, np.float32))
    assert np.isfinite(flat).all()


def test_augment():
    image = drawn_source(rng(0), (40, 56))
    before = image.copy()
    out = [augment(rng(i), image) for i in range(20)]
    assert np.array_equal(image, before) and all(o.dtype == np.float32 and 0 <= o.min() and o.max() <= 1 for o in out)
    assert len({o.tobytes() for o in out}) == 20
    assert np.array_equal(augment(rng(0), image, 0), image)


def test_same_generator_same_defect():
    for kind in [None, *DEFECTS]:
        (a, ma), (b, mb), (c, _) = (synthesise(rng(s), TILE, kind) for s in (7, 7, 8))
        assert np.array_equal(a, b) and np.array_equal(ma, mb) and not np.array_equal(a, c)


def test_all_kinds_are_drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(synthetic, "DEFECTS", {k: lambda g, x, k=k: (seen.append(k) or x, np.ones(x.shape[:2], bool)) for k in DEFECTS})
    for i in range(100):
        synthesise(rng(i), TILE)
    assert set(seen) == set(DEFECTS)


def test_bad_input():
    with pytest.raises(AnomnbError, match="did you mean 'stain'"):
        synthesise(rng(0), TILE, "stains")
    with pytest.raises(AnomnbError, match="did you mean 'weave'"):
        drawn_source(rng(0), (16, 16), "weaves")
    with pytest.raises(AnomnbError, match="one colour"):
        synthesise(rng(0), np.zeros((32, 32, 3), np.float32), "cut_paste")
    for bad in (draw_good(0, "a", 0, 32), TILE[..., 0], TILE.astype(float)):
        with pytest.raises(AnomnbError, match="float32 H×W×3"):
            keep_visible(bad, bad)
        with pytest.raises(AnomnbError, match="float32 H×W×3"):
            synthesise(rng(0), bad, "scratch")


def test_without_torch():
    code = "import sys\nfor n in ('torch', 'lightning', 'timm'): sys.modules[n] = None\nimport anomnb.data.synthetic"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
