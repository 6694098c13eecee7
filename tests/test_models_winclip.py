"WinCLIP against its equations in numpy, with and without reference images, saved, exported, and on bad input"
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit

from anomnb.core.errors import AnomnbError, AnomnbFileError
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load
from anomnb.export.parity import export_model
from anomnb.models.base import merge
from anomnb.models.clip import ClipTower, prompts, window_places
from anomnb.models.winclip import References, WinClip, WinClipNet, harmonic_map, text_score

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
needs_clip = pytest.mark.skipif(not find_spec("open_clip"), reason="open_clip is not installed: pip install 'anomnb[clip]'")
SMALL = dict(embed_dim=16, vision_cfg=dict(image_size=64, patch_size=16, width=32, head_width=16, layers=2), text_cfg=dict(width=16, heads=2, layers=1))
TINY = dict(backbone=SMALL, weights="random", image_size=64, shots=2)
GOOD = [draw_good(0, "winclip", i, 96) for i in range(5)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=2).fit(WinClip(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def few():
    return fit()


@pytest.fixture(scope="module")
def zero():
    return fit(shots=0)


def naive_harmonic(scores, h, w, size):
    "At each patch the harmonic mean over the windows that hold it"
    held = [[[] for _ in range(w)] for _ in range(h)]
    for n, s in enumerate(scores):
        top, left = divmod(n, w - size + 1)
        for y in range(top, top + size):
            for x in range(left, left + size):
                held[y][x].append(s)
    return np.array([[len(o)/sum(1/v for v in o) for o in row] for row in held])


def naive_window(tower, x, size):
    "CLIP's own forward on an image of which only some patches are left"
    v, out = tower.net, []
    h, w = tower.grid
    t = v._embeds(x)
    for top in range(h - size + 1):
        for left in range(w - size + 1):
            keep = [0] + [1 + y*w + x for y in range(top, top + size) for x in range(left, left + size)]
            out.append(v._pool(v.transformer(t[:, keep]))[0] @ v.proj)
    return torch.stack(out, 1)


@pytest.mark.parametrize("h, w, size", [(3, 3, 3), (4, 6, 2), (5, 4, 3), (15, 15, 3)])
def test_harmonic_mean(h, w, size):
    scores = np.random.default_rng(0).uniform(0.01, 1, (2, (h - size + 1)*(w - size + 1)))
    found = harmonic_map(torch.from_numpy(scores), h, w, size)
    np.testing.assert_allclose(found, [naive_harmonic(o, h, w, size) for o in scores], rtol=1e-10)


def test_a_distance_of_zero_is_no_fault():
    found = harmonic_map(torch.zeros(1, 9), 4, 4, 2)
    assert torch.isfinite(found).all() and found.max() <= 1e-6


def test_window_places():
    at = window_places(4, 5, 3)
    assert at.shape == (6, 9) and at[4].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_prompts():
    good, anomalous = prompts("metal nut")
    assert (len(good), len(anomalous)) == (154, 88) and len({*good, *anomalous}) == 242
    assert all("metal nut" in o and o.startswith("a ") and o.endswith(".") and "{" not in o and "  " not in o for o in good + anomalous)
    assert {"a photo of a metal nut.", "a cropped photo of the flawless metal nut.", "a photo of a small metal nut without flaw."} <= set(good)
    assert {"a jpeg corrupted photo of the damaged metal nut.", "a photo of the metal nut with damage for anomaly detection."} <= set(anomalous)


def test_text_score_is_a_softmax():
    g = torch.Generator().manual_seed(0)
    e, text = torch.randn(4, 7, 8, generator=g).double(), F.normalize(torch.randn(2, 8, generator=g).double(), dim=1)
    want = torch.softmax(F.normalize(e, dim=2) @ text.T/0.07, 2)[..., 1]
    torch.testing.assert_close(text_score(e, text), want)


def test_references_are_the_first():
    rows = torch.arange(12.).view(6, 2)
    a, b = References(4, 2), References(4, 2)
    a.update(rows[:2]), a.update(rows[2:3]), b.update(rows[3:])
    assert (a.left, b.left) == (1, 1)
    again = References(4, 2).set_state(a.state())
    assert torch.equal(a.copy().merge(b).finish(), rows[:4]) and len(a.rows) == 3 and torch.equal(again.merge(b).rows, rows[:4])
    assert len(References(0, 2).merge(References(0, 2)).finish()) == 0


@needs_clip
@pytest.mark.parametrize("image_size", [64, (48, 80)])
def test_windows(image_size):
    tower = ClipTower(SMALL, "random", image_size)
    clip = tower.build()
    x = torch.randn(2, 3, *tower.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tower(x)[0], clip.encode_image(x), rtol=1e-4, atol=1e-5)  # float32 in another order
        for size in (2, 3):
            torch.testing.assert_close(tower.windows(tower.tokens(x), size), naive_window(tower, x, size), rtol=1e-4, atol=1e-5)


@needs_clip
def test_zero_shot(zero):
    x, net = unit(ODD), zero.net
    assert len(net.bank1) == 0 and zero.accumulator.left == 0 and len(zero.fitted_images) == 5
    with torch.inference_mode():
        raw, p = zero(x), zero.pre(x)
        score = text_score(net.backbone(p)[0], net.text).double().numpy()
        inside = {s: text_score(naive_window(net.backbone, p, s), net.text).double().numpy() for s in (2, 3)}
    h, w = net.backbone.grid
    whole = np.stack([3/(1/s + 1/naive_harmonic(a, h, w, 2) + 1/naive_harmonic(b, h, w, 3)) for s, a, b in zip(score, inside[2], inside[3])])
    want = F.interpolate(torch.from_numpy(whole)[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(raw.score, score, rtol=1e-5)
    np.testing.assert_allclose(raw.map, want, rtol=1e-4)  # float32 through two blocks


@needs_clip
def test_few_shot(few):
    x, net = unit(ODD), few.net
    refs = few.pre(unit(GOOD[:2]))
    with torch.inference_mode():
        raw, p = few(x), few.pre(x)
        kinds = {1: lambda i: net.backbone(i)[1], **{s: lambda i, s=s: naive_window(net.backbone, i, s) for s in (2, 3)}}
        maps = []
        for s, see in kinds.items():
            q, bank = (F.normalize(see(i).double(), dim=2).numpy() for i in (p, refs))
            d = 0.5*(1 - (q @ bank.reshape(-1, bank.shape[2]).T).max(2))
            maps.append([naive_harmonic(o, 4, 4, s) for o in np.maximum(d, 1e-6)])
        score = text_score(net.backbone(p)[0], net.text).double().numpy()
    want = np.mean(maps, 0)
    np.testing.assert_allclose(raw.score, (score + want.max((1, 2)))/2, rtol=1e-3)
    up = F.interpolate(torch.from_numpy(want)[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(raw.map, up, rtol=2e-2, atol=1e-4*float(up.max()))  # 1 - cosine of near twins in float32


@needs_clip
def test_references_of_a_fit(few):
    assert [len(getattr(few.net, f"bank{s}")) for s in (1, 2, 3)] == [2*16, 2*9, 2*4]
    first = fit(GOOD[:2])
    assert all(torch.equal(getattr(first.net, f"bank{s}"), getattr(few.net, f"bank{s}")) for s in (1, 2, 3))
    with torch.inference_mode():
        at_home, away = few(unit(GOOD[:2])), few(unit(ODD))
    assert at_home.map.max() < 1e-4 and away.map.max() > 10*at_home.map.max()
    assert len(fit(GOOD[:1]).net.bank1) == 16  # fewer images than asked for


@needs_clip
def test_parts_and_going_on():
    whole, parts = fit(shots=4), merge(fit(GOOD[:3], shots=4), fit(GOOD[3:], shots=4))
    torch.testing.assert_close(whole.net.bank3, parts.net.bank3, rtol=1e-4, atol=1e-5)  # other batches
    assert torch.equal(whole.net.text, parts.net.text)
    more = Engine(quiet=True, num_workers=0, batch_size=2).partial_fit(fit(GOOD[:1]), GOOD[1:], calibrate=False)
    torch.testing.assert_close(more.net.bank3, fit().net.bank3, rtol=1e-4, atol=1e-5)


@needs_clip
@pytest.mark.parametrize("shots", [0, 2])
def test_any_batch_and_any_shape(shots):
    model = fit(shots=shots, image_size=(64, 96))
    with torch.inference_mode():
        whole = model(unit(ODD))
        assert whole.map.shape == (3, 64, 96)
        for i, o in enumerate(ODD):
            alone = model(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5 and abs(whole.score[i] - alone.score[0]) <= 1e-5
        assert model([torch.rand(3, 40, 70), torch.rand(3, 90, 50)]).map.shape == (2, 64, 96)


@needs_clip
def test_words_count(zero):
    other = fit(shots=0, class_name="hazelnut")
    assert not torch.equal(other.net.text, zero.net.text) and torch.equal(other.net.backbone.net.proj, zero.net.backbone.net.proj)
    assert torch.equal(fit(shots=0).net.text, zero.net.text)
    torch.testing.assert_close(zero.net.text.norm(dim=1), torch.ones(2))


@needs_clip
@pytest.mark.parametrize("which", ["few", "zero"])
def test_saved(which, request, tmp_path, monkeypatch):
    model = request.getfixturevalue(which)
    path = model.save(tmp_path / "m.safetensors", resumable=True)
    import open_clip.model

    def refuse(*args, **kw):
        raise AssertionError("a text encoder or a file of weights was asked for")

    for name in ("CLIP", "_build_text_tower"):
        monkeypatch.setattr(open_clip.model, name, refuse)
    monkeypatch.setattr("anomnb.models.clip.read_weights", refuse)
    monkeypatch.setattr("anomnb.models.clip.published_clip", refuse)
    again = load(path)
    with torch.inference_mode():
        ours, theirs = model(unit(ODD)), again(unit(ODD))
    assert torch.equal(ours.map, theirs.map) and torch.equal(ours.score, theirs.score) and again.args == model.args
    assert again.accumulator.left == model.accumulator.left


@needs_clip
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("which", ["few", "zero"])
def test_parity(which, kind, request, tmp_path):
    _, parity = export_model(request.getfixturevalue(which), tmp_path / "m", kind, images=ODD)
    assert parity.ok and {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}


@needs_clip
def test_weights_of_a_file(tmp_path):
    clip = ClipTower(SMALL, "random").build()
    with torch.no_grad():
        clip.visual.proj.add_(1)
        clip.text_projection.mul_(-1)
    path = tmp_path / "clip.pth"
    torch.save(dict(epoch=3, state_dict={f"module.{k}": v for k, v in clip.state_dict().items()}), path)
    model = WinClip(**{**TINY, "weights": str(path)}).build()
    assert torch.equal(model.net.backbone.net.proj, clip.visual.proj) and not torch.equal(model.net.text, WinClip(**TINY).build().net.text)
    wide = WinClip(**{**TINY, "weights": str(path), "image_size": (64, 96)}).build()
    assert wide.net.backbone.net.positional_embedding.shape == (1 + 4*6, 32) and torch.equal(wide.net.text, model.net.text)
    saved = Engine(quiet=True, num_workers=0).fit(model, GOOD, calibrate=False).save(tmp_path / "m.safetensors")
    path.unlink()
    assert torch.equal(load(saved).net.text, model.net.text)
    torch.save({k: v for k, v in clip.state_dict().items() if "text_projection" not in k}, path)
    with pytest.raises(AnomnbError, match="text_projection.*of words too"):
        WinClip(**{**TINY, "weights": str(path)}).build()
    torch.save({**clip.state_dict(), "visual.proj": torch.zeros(3, 3)}, path)
    with pytest.raises(AnomnbError, match="size mismatch for visual.proj"):
        WinClip(**{**TINY, "weights": str(path)}).build()
    with pytest.raises(AnomnbFileError, match="no file of weights"):
        WinClip(**{**TINY, "weights": str(tmp_path / "none.pth")}).build()


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(AnomnbError, match=r"pip install 'anomnb\[clip\]'"):
        WinClip(**TINY)


@needs_clip
def test_published_weights(monkeypatch):
    model = WinClip()
    assert (model.pre.size, model.grid(), model.backbone.tag, model.backbone.dims) == ((240, 240), (15, 15), "laion400m_e31", 640)
    assert tuple(round(o, 4) for o in model.pre.mean.flatten().tolist()) == (0.4815, 0.4578, 0.4082)
    monkeypatch.setattr("anomnb.models.weights._cached", lambda *a: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AnomnbError, match="weights='a/file.safetensors'.*weights='random'"):
        Engine(quiet=True, num_workers=0).fit(WinClip(), GOOD, calibrate=False)
    with pytest.raises(AnomnbError, match="no published weights"):
        WinClip(backbone=SMALL).build()


@needs_clip
def test_names_of_backbones():
    assert ClipTower("ViT-B-32:openai").quick and not ClipTower("ViT-B-32:laion2b_s34b_b79k").quick
    assert not ClipTower("ViT-B-32", "random").quick and ClipTower("ViT-B-32-quickgelu", "random").quick
    own = dict(embed_dim=16, vision_cfg=dict(depth=2), text_cfg={})
    said = {"ViT-B-16-plus-24": "did you mean 'ViT-B-16-plus-240'", "ViT-B-32:laion": "unknown weights tag", "RN50": "not a plain vision transformer",
            "coca_ViT-B-32": "not a plain", "ViT-B-16-SigLIP": "not a plain"}
    more = [(own, "depth"), ({}, "embed_dim, vision_cfg and text_cfg"), (dict(vision_cfg={}, text_cfg={}), "embed_dim"), (7, "unknown backbone")]
    for name, said in [*said.items(), *more]:
        with pytest.raises(AnomnbError, match=said):
            ClipTower(name)


@needs_clip
def test_net_stays_in_eval_mode():
    net = WinClip(**TINY).build().train().net
    assert isinstance(net, WinClipNet) and not any(m.training for m in net.backbone.modules()) and not any(p.requires_grad for p in net.parameters())


@needs_clip
def test_bad_input():
    for kw, said in ((dict(class_name=" "), "a word or two"), (dict(shots=-1), "or 0"), (dict(shots=True), "or 0"), (dict(image_size=100), "multiples of 16"),
                     (dict(image_size=32), "48 or more"), (dict(k_shot=2), "unknown argument")):
        with pytest.raises(AnomnbError, match=said):
            WinClip(**{**TINY, **kw})
    with pytest.raises(AnomnbError, match="not fitted"):
        WinClip(**TINY)(torch.rand(1, 3, 64, 64))
