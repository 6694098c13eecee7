"The drawn toy set: same seed same bytes, exact masks, layout, reuse, refusal, interruption"
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.data import toy
from anomnb.data.textures import disc, ink, place, soft_noise
from anomnb.data.toy import GRADES, KINDS, VISIBLE, draw_defect, draw_good, draw_toy

SMALL = dict(n_train=2, n_good=1, n_defects=1, size=48)


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory): return draw_toy(tmp_path_factory.mktemp("toy")/"set", **SMALL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grade", GRADES)
def test_mask_is_what_changed(kind, grade):
    for index, size in ((0, 256), (5, 256), (1, 100)):
        image, mask = draw_defect(7, kind, grade, index, size)
        good = draw_good(7, f"{kind}-{grade}", index, size)
        change = np.abs(image.astype(int) - good).max(-1)
        assert image.dtype == np.uint8 and image.shape == (size, size, 3) and mask.dtype == bool and mask.any()
        assert np.array_equal(mask, change > 0)
        assert change[mask].min() >= VISIBLE


@pytest.mark.parametrize("kind", KINDS)
def test_grades_grow(kind):
    area = [np.median([draw_defect(3, kind, g, i)[1].sum() for i in range(6)]) for g in GRADES]
    assert area[2] > 2*area[0] and area[1] >= area[0]*0.9


def test_every_defect_is_seen():
    "No damaged image without damage, over several seeds: a mask of the smallest grade has at least 20 pixels at 256"
    assert min(draw_defect(s, k, 1, i)[1].sum() for s in (0, 1) for k in KINDS for i in range(4)) >= 20


def test_same_seed_same_pixels():
    a = draw_good(1, "train", 4)
    draw_good(1, "train", 3), np.random.seed(0)
    assert np.array_equal(a, draw_good(1, "train", 4))
    assert (a != draw_good(1, "test", 4)).any() and (a != draw_good(2, "train", 4)).any()


def test_size_changes_only_the_sampling():
    "Light, place and pattern stay: the picture at half the size is near the mean of 2×2 pixels"
    big, half = draw_good(0, "train", 0, 256), draw_good(0, "train", 0, 128)
    mean = big.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(mean - half).mean() < 6  # of 255; noise, blur and the grain of the wood differ


def test_bytes_are_equal_across_processes(small, tmp_path):
    code = f"from anomnb.data.toy import draw_toy; draw_toy({str(tmp_path/'b')!r}, **{SMALL!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert contents(small) == contents(tmp_path/"b")


def test_draws_without_torch():
    code = "import sys; sys.modules['torch'] = None; from anomnb.data.toy import draw_good; draw_good(0, 'train', 0, 48)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layout(small):
    names = set(contents(small))
    bad = {f"test/{k}/{i:03}.png" for k in KINDS for i in range(3)}
    masks = {f"ground_truth/{k}/{i:03}_mask.png" for k in KINDS for i in range(3)}
    good = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
    assert names == good | bad | masks | {"defects.csv", "toy.json"}
    for m in masks:
        im = Image.open(small/m)
        assert im.mode == "L" and set(np.unique(im)) == {0, 255}


def test_csv_tells_kind_grade_and_area(small):
    rows = list(csv.DictReader(io.StringIO((small/"defects.csv").read_text())))
    assert [(r["kind"], int(r["grade"])) for r in rows] == [(k, g) for k in KINDS for g in GRADES]
    for r in rows:
        mask = np.asarray(Image.open(small/f"ground_truth/{r['kind']}/{Path(r['file']).stem}_mask.png"))
        assert int(r["area"]) == (mask > 0).sum()
        image, _ = draw_defect(0, r["kind"], int(r["grade"]), 0, 48)
        assert np.array_equal(np.asarray(Image.open(small/r["file"])), image)


def test_reuse_draws_nothing(small, monkeypatch):
    monkeypatch.setattr(toy, "write_file", lambda *a: pytest.fail("wrote"))
    assert draw_toy(small, **SMALL) == small


def test_mismatch_is_refused(small):
    before = contents(small)
    for other in (dict(seed=1), dict(n_train=3), dict(size=64)):
        with pytest.raises(AnomnbError, match="another toy set"): draw_toy(small, **(SMALL | other))
    assert contents(small) == before


def test_another_version_is_refused(tmp_path, monkeypatch):
    draw_toy(tmp_path/"a", **SMALL)
    monkeypatch.setattr(toy, "_VERSION", toy._VERSION + 1)
    with pytest.raises(AnomnbError, match="another toy set"): draw_toy(tmp_path/"a", **SMALL)


@pytest.mark.parametrize("change", ["lost", "edited", "added"])
def test_a_changed_set_is_refused(tmp_path, change):
    folder = draw_toy(tmp_path/"a", **SMALL)
    p = folder/"train/good/000.png"
    if change == "lost": p.unlink()
    elif change == "edited": p.write_bytes(p.read_bytes()[:-1])
    else: (p.parent/"mine.png").write_bytes(p.read_bytes())
    with pytest.raises(AnomnbError, match="was changed since"): draw_toy(folder, **SMALL)


@pytest.mark.parametrize("held", ["", "[1]", "{}", '{"size": 48}'])
def test_a_foreign_marker_is_refused(tmp_path, held):
    (tmp_path/"toy.json").write_text(held)
    with pytest.raises(AnomnbError, match="another toy set"): draw_toy(tmp_path, **SMALL)
    assert contents(tmp_path) == {"toy.json": held.encode()}


def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path/"photo.png").write_bytes(b"mine")
    with pytest.raises(AnomnbError, match="not empty"): draw_toy(tmp_path, **SMALL)
    assert contents(tmp_path) == {"photo.png": b"mine"}


@pytest.mark.parametrize("at", [0, 1, 5, 39, 41])
def test_interrupted_then_finished(small, tmp_path, monkeypatch, at):
    "Whichever write fails, there is no marker, other arguments are refused, and the next call ends with the very same set"
    calls, write = [], toy.write_file
    def fault(path, content):
        calls.append(path)
        if len(calls) > at: raise AnomnbError("no space left")
        return write(path, content)
    monkeypatch.setattr(toy, "write_file", fault)
    with pytest.raises(AnomnbError, match="no space"): draw_toy(tmp_path/"a", **SMALL)
    monkeypatch.setattr(toy, "write_file", write)
    assert not (tmp_path/"a/toy.json").exists()
    if at:
        with pytest.raises(AnomnbError, match="another toy set"): draw_toy(tmp_path/"a", **(SMALL | dict(seed=1)))
    assert contents(draw_toy(tmp_path/"a", **SMALL)) == contents(small)


def test_a_killed_run_is_finished(small, tmp_path):
    code = f"""
import os
from anomnb.data import toy
write, n = toy.write_file, []
def die(path, content):
    n.append(path)
    if len(n) == 20: os._exit(9)
    return write(path, content)
toy.write_file = die
toy.draw_toy({str(tmp_path/'a')!r}, **{SMALL!r})"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert (tmp_path/"a/.toy-drawing.json").exists() and not (tmp_path/"a/toy.json").exists()
    assert contents(draw_toy(tmp_path/"a", **SMALL)) == contents(small)


def test_the_marker_holds_the_arguments(small):
    held = json.loads((small/"toy.json").read_text())
    assert {k: held[k] for k in SMALL} == SMALL and len(held["sha256"]) == 64


@pytest.mark.parametrize("wrong", [dict(size=8), dict(n_train=-1), dict(n_good=1.5), dict(seed="x")])
def test_bad_arguments(tmp_path, wrong):
    with pytest.raises(AnomnbError, match=next(iter(wrong))): draw_toy(tmp_path/"a", **(SMALL | wrong))
    assert not (tmp_path/"a").exists()


def test_bad_kind_and_grade():
    with pytest.raises(AnomnbError, match="did you mean 'crack'"): draw_defect(0, "krack", 1, 0)
    for grade in (0, 4, "1"):
        with pytest.raises(AnomnbError, match="smallest"): draw_defect(0, "crack", grade, 0)


def test_a_disc_has_its_area():
    "The soft-edged disc covers pi r² to 1 %: Pillow fills whole pixels of the fourfold picture"
    for at in ((0, 0), (0.21, -0.13)):
        assert abs(ink(128, [((255, 0, 0), place(disc(0.4, 200), at))])[..., 0].sum()*4/128**2/(np.pi*0.16) - 1) < 0.03


def test_noise_has_unit_spread():
    drawn = np.stack([soft_noise(np.random.default_rng(i), 64, 6) for i in range(200)])
    assert abs(drawn.mean()) < 0.05 and 0.8 < drawn.std() < 1.2
