"""Detectors on the tokens of transformers: against naive code, small inputs, views, saving, merging, exporting. No transformer's weights are needed."""
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional as F

from anomnb.core.errors import AnomnbError
from anomnb.core.names import create_model
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load, save
from anomnb.export.parity import export_model
from anomnb.models.anomaly_dino import AnomalyDino, foreground_mask
from anomnb.models.backbones import Backbone
from anomnb.models.base import merge
from anomnb.models.subspace_ad import FromViews, SubspaceAd, mean_of_top, middle_blocks, turned

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
VIT = dict(backbone="vit_tiny_patch16_224", weights="random", image_size=(64, 96))
CNN = dict(backbone="resnet18", weights="random", image_size=64)
BOTH = [AnomalyDino, SubspaceAd]
EACH = [(cls, kw) for cls in BOTH for kw in (VIT, CNN)]
MASKED = {**VIT, "image_size": 160, "foreground": 10.0, "num_neighbors": 2}
GOOD = [draw_good(0, "tokens", i, 64) for i in range(6)]
IMAGES = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def unit(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def fitted(cls, images=GOOD, rotations=2, **kwargs):
    return Engine(quiet=True, batch_size=4).fit(cls(rotations=rotations, **kwargs), list(images), calibrate=False).eval()


def ask(model, images):
    with torch.inference_mode():
        return model(unit(images))


def rows_of(model, images):
    "All patches of all views, float64"
    with torch.no_grad():
        return model.features(unit(images)).permute(0, 2, 3, 1).flatten(0, 2).double()


# Against naive code

@pytest.mark.parametrize("kw", [VIT, CNN])
@pytest.mark.parametrize("k", [1, 3])
def test_anomaly_dino_is_the_cosine_distance_to_the_nearest(kw, k):
    model = fitted(AnomalyDino, num_neighbors=k, **kw)
    rows, query = rows_of(model, GOOD), F.normalize(model.net.tokens(model.pre(unit(IMAGES))).double(), dim=1)
    assert len(model.net.bank) == len(rows) and torch.allclose(rows.norm(dim=1), torch.ones(len(rows)).double(), atol=1e-6)
    d = (1 - query.permute(0, 2, 3, 1) @ rows.T).sort(-1)[0][..., :k].mean(-1).flatten(1)
    want = d.sort(1, descending=True)[0][:, :max(1, d.shape[1]//100)].mean(1)
    torch.testing.assert_close(ask(model, IMAGES).score.double(), want, rtol=1e-3, atol=1e-6)  # 1 - cos of float32 rows loses digits near 0


@pytest.mark.parametrize("kw", [VIT, CNN])
def test_subspace_ad_is_the_residual_of_a_pca(kw):
    model = fitted(SubspaceAd, variance=0.95, **kw)
    x = rows_of(model, GOOD)
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    part = s.square().cumsum(0)/s.square().sum()
    k = int((part < 0.95).sum()) + 1
    assert model.net.basis.shape == (x.shape[1], k) and part[k - 1] >= 0.95 > (part[k - 2] if k > 1 else 0)
    e = model.net.embed(model.pre(unit(IMAGES))).permute(0, 2, 3, 1).double() - x.mean(0)
    d = (e - e @ v[:k].T @ v[:k]).square().sum(-1)
    map = model.net.blur(F.interpolate(d[:, None].float(), size=model.pre.size, mode="bilinear"))[:, 0]
    found = ask(model, IMAGES)
    torch.testing.assert_close(found.map, map, rtol=1e-3, atol=1e-6*float(map.max()))
    flat = found.map.flatten(1)
    torch.testing.assert_close(found.score, flat.sort(1, descending=True)[0][:, :int(flat.shape[1]*0.01)].mean(1))


@pytest.mark.parametrize("size", [(48, 48), (40, 72), (33, 20)])
@pytest.mark.parametrize("angle", [0, 30, 90, 135, 200.5, -45])
def test_turned_is_what_scipy_turns(size, angle):
    x = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=size), 1)
    ours = turned(torch.from_numpy(x)[None, None], angle)[0, 0].numpy()
    theirs = ndimage.rotate(x, angle, reshape=False, order=1, mode="mirror")
    assert abs(ours - theirs).max() < 1e-9


def test_mean_of_top():
    x = torch.rand(3, 1234)
    assert torch.allclose(mean_of_top(x), x.sort(1)[0][:, -12:].mean(1)) and torch.equal(mean_of_top(x[:, :99]), x[:, :99].amax(1))


def test_foreground_is_the_first_principal_component():
    g = torch.Generator().manual_seed(0)
    for side in (1, -1):  # the part may lie on either side of the axis
        part = torch.zeros(20, 28)
        part[5:15, 6:22] = 1
        x = torch.randn(2, 24, 20, 28, generator=g) + side*15*part*F.normalize(torch.randn(24, 1, 1, generator=g), dim=0)
        for image, mask in zip(x, foreground_mask(x, 4.0)):
            t = image.flatten(1).T.double()
            t = t - t.mean(0)
            along = t @ torch.linalg.svd(t, full_matrices=False)[2][0]
            along = (along*along.reshape(20, 28)[4:16, 5:22].sum().sign()).reshape(20, 28)
            want = ndimage.binary_dilation((along > 4).numpy(), np.ones((3, 3)))
            want = ndimage.binary_erosion(ndimage.binary_dilation(want, np.ones((3, 3))), np.ones((3, 3)), border_value=1)
            assert (mask.numpy() == want).mean() > 0.995 and (mask >= part).all()


def test_foreground_masks_map_and_score():
    larger = {**VIT, "image_size": 160}
    masked, plain = fitted(AnomalyDino, foreground=10, **larger), fitted(AnomalyDino, **larger)
    a, b = ask(masked, IMAGES), ask(plain, IMAGES)
    assert (a.score <= b.score).all() and not torch.equal(a.map, b.map) and (a.map <= b.map + 1e-7).all()
    nothing = fitted(AnomalyDino, foreground=1e6, **larger)
    assert torch.equal(ask(nothing, IMAGES).map, b.map)


# Views

@pytest.mark.parametrize("cls,kw", EACH)
def test_a_fit_takes_view_by_view_what_features_gives_at_once(cls, kw):
    model = cls(rotations=3, **kw).build()
    x = unit(GOOD[:2])
    views = list(model.views(x))
    assert len(views) == 3 and torch.equal(torch.cat(views), model.features(x))
    assert torch.equal(views[0], FromViews.__mro__[1].features(model, x)) and not torch.allclose(views[0], views[1])
    assert model.rows_per_image() == 3*views[0].shape[2]*views[0].shape[3]


def test_turned_views_make_a_turned_part_good():
    turns = [np.rot90(o).copy() for o in GOOD]
    for cls in BOTH:
        alone, all_ways = fitted(cls, rotations=1, **CNN), fitted(cls, rotations=4, **CNN)
        assert (ask(all_ways, turns).score < 0.7*ask(alone, turns).score).all()


# Small and wrong input

@pytest.mark.parametrize("cls", BOTH)
def test_three_by_three(cls):
    model = fitted(cls, GOOD[:1], rotations=1, **{**CNN, "image_size": 24})
    assert model.grid() == (3, 3)
    found = ask(model, IMAGES)
    assert torch.isfinite(found.map).all() and found.map.shape == (3, 24, 24)
    if cls is AnomalyDino:
        d = model.net.distances(model.net.embed(model.pre(unit(IMAGES))))
        assert torch.allclose(found.score, d.flatten(1).amax(1)) and len(model.net.bank) == 9


@pytest.mark.parametrize("cls,kw", EACH)
def test_one_image_is_good_to_itself(cls, kw):
    model = fitted(cls, GOOD[:1], rotations=1, **kw)
    own, other = ask(model, GOOD[:1]).score, ask(model, IMAGES[2:]).score
    assert torch.isfinite(own) and own < 0.5*other


@pytest.mark.parametrize("cls", BOTH)
def test_images_without_any_texture(cls):
    model = fitted(cls, [np.full((64, 64, 3), 90, np.uint8)]*2, rotations=1, **VIT)
    found = ask(model, [np.full((64, 64, 3), 90, np.uint8), IMAGES[2][:64, :64]])
    assert torch.isfinite(found.map).all() and found.score[0] < 1e-3*found.score[1]


@pytest.mark.parametrize("args,words", [
    (dict(rotations=0), "1 for the image alone"),
    (dict(rotations=-3), "rotations=-3"),
    (dict(rotations=2.5), "rotations=2.5"),
    (dict(rotations=True), "rotations=True"),
    (dict(backbone="vit_small_patch14_dinov2", image_size=256), "multiples of 14 such as 252×252"),
    (dict(backbone="vit_tiny_patch16_224", image_size=(64, 100)), "multiples of 16 such as 64×96"),
    (dict(image_size="big"), "image_size='big'"),
    (dict(backbone="swin_tiny_patch4_window7_224", image_size=256), "224×224 alone"),
])
def test_bad_arguments_of_both(args, words):
    for cls in BOTH:
        with pytest.raises(AnomnbError, match=words):
            cls(**args)


@pytest.mark.parametrize("cls,args,words", [
    *[(SubspaceAd, dict(variance=v), "above 0 and at most 1") for v in (0, -0.1, 1.01, float("nan"), "all", True)],
    *[(AnomalyDino, dict(coreset_ratio=v), "above 0 and at most 1") for v in (0, -1, 1.5)],
    *[(AnomalyDino, dict(num_neighbors=v), "at least 1") for v in (0, -2, 1.5)],
    *[(AnomalyDino, dict(foreground=v), "threshold of 0 or more") for v in (-1, "yes", True, float("nan"))],
    (SubspaceAd, dict(rotation=3), "did you mean 'rotations'"),
    (AnomalyDino, dict(coreset_sampling_ratio=.1), "coreset_ratio"),
])
def test_bad_arguments_of_one(cls, args, words):
    with pytest.raises(AnomnbError, match=words):
        cls(**args)


def test_more_neighbours_than_rows():
    with pytest.raises(AnomnbError, match="num_neighbors=10 but the bank has 9 rows"):
        fitted(AnomalyDino, GOOD[:1], rotations=1, num_neighbors=10, **{**CNN, "image_size": 24})


def test_a_subspace_of_everything():
    few = fitted(SubspaceAd, GOOD[:1], rotations=1, variance=1.0, **VIT)  # 24 tokens span less than 192 directions
    assert few.net.basis.shape[1] <= 23 and ask(few, IMAGES).score.min() > 100*ask(few, GOOD[:1]).score
    with pytest.raises(AnomnbError, match="nothing would be anomalous"):
        fitted(SubspaceAd, GOOD, rotations=2, variance=1.0, backbone="tf_efficientnet_lite0", image_size=128)


@pytest.mark.parametrize("cls", BOTH)
def test_features_that_are_not_finite_are_named(cls, monkeypatch):
    model = cls(rotations=1, **CNN).build()
    embed = type(model.net).embed
    monkeypatch.setattr(type(model.net), "embed", lambda self, x: embed(self, x)/0 - embed(self, x)/0)
    with pytest.raises(AnomnbError, match="not finite"):
        Engine(quiet=True).fit(model, GOOD, calibrate=False)
    assert not model.fitted


# One answer

@pytest.mark.parametrize("cls,kw", EACH)
def test_the_batch_changes_nothing(cls, kw):
    model = fitted(cls, **kw)
    together, alone = ask(model, IMAGES).map, torch.cat([ask(model, [o]).map for o in IMAGES])
    assert (together - alone).abs().max() <= 1e-5*(together.max() - together.min())


@pytest.mark.parametrize("cls,kw", EACH)
def test_saved_loaded_gone_on(cls, kw, tmp_path):
    half, whole = fitted(cls, GOOD[:3], **kw), fitted(cls, **kw)
    back = load(save(half, tmp_path / "a.safetensors"))
    a, b = ask(half, IMAGES), ask(back.eval(), IMAGES)
    assert torch.equal(a.map, b.map) and torch.equal(a.score, b.score) and back.args["rotations"] == 2
    with pytest.raises(AnomnbError, match="resumable=True"):
        Engine(quiet=True).partial_fit(back, GOOD[3:], calibrate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loaded model brings its weights
        more = load(save(half, tmp_path / "b.safetensors", resumable=True))
        Engine(quiet=True).partial_fit(more, GOOD[3:], calibrate=False)
    torch.testing.assert_close(ask(more.eval(), IMAGES).map, ask(whole, IMAGES).map, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls,kw", EACH)
def test_merged_is_fitted_together(cls, kw):
    parts = merge(merge(fitted(cls, GOOD[4:], **kw), fitted(cls, GOOD[:1], **kw)), fitted(cls, GOOD[1:4], **kw))
    torch.testing.assert_close(ask(parts.eval(), IMAGES).map, ask(fitted(cls, **kw), IMAGES).map, rtol=1e-4, atol=1e-6)
    with pytest.raises(AnomnbError, match="same arguments"):
        merge(parts, fitted(cls, GOOD[:1], rotations=1, **kw))


@pytest.mark.parametrize("kw", [VIT, CNN])
def test_forgotten_is_never_seen(kw):
    model = fitted(SubspaceAd, **kw)
    before = ask(model, IMAGES).map
    Engine(quiet=True).forget(model, GOOD[4:])
    assert not torch.allclose(ask(model.eval(), IMAGES).map, before, rtol=1e-3)
    torch.testing.assert_close(ask(model.eval(), IMAGES).map, ask(fitted(SubspaceAd, GOOD[:4], **kw), IMAGES).map, rtol=1e-4, atol=1e-6)
    with pytest.raises(AnomnbError, match="not in the fit"):
        Engine(quiet=True).forget(model, GOOD[4:])
    with pytest.raises(AnomnbError, match="can't forget every image"):
        Engine(quiet=True).forget(model, GOOD[:4])


def test_a_bank_forgets_nothing():
    with pytest.raises(AnomnbError, match="AnomalyDino can't forget"):
        Engine(quiet=True).forget(fitted(AnomalyDino, **CNN), GOOD[:1])


def test_bounded():
    m = SubspaceAd(**CNN)
    assert m.memory(100, 4) == m.memory(10**9, 4)  # however many images
    least, wanted = m.memory(100, 4)
    assert least < wanted == 40*384**2
    bank = AnomalyDino(rotations=8, coreset_ratio=0.1, **CNN)
    assert bank.memory(100, 4)[0] < 0.2*bank.memory(100, 4)[1] and bank.memory(100, 4)[1] == 8*AnomalyDino(coreset_ratio=0.1, **CNN).memory(100, 4)[1]
    with pytest.raises(AnomnbError, match="needs at least"):
        Engine(quiet=True, max_memory="100KB").fit(AnomalyDino(**CNN), GOOD, calibrate=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the sketch keeps")
        small = Engine(quiet=True, max_memory=least + m.batch_bytes(4), batch_size=4).fit(SubspaceAd(rotations=2, **CNN), GOOD, calibrate=False)
    assert torch.isfinite(ask(small.eval(), IMAGES).map).all()


# Exported

@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@pytest.mark.parametrize("cls,kw", [(AnomalyDino, None), (SubspaceAd, None), (AnomalyDino, VIT), (SubspaceAd, VIT), (AnomalyDino, MASKED)])
def test_parity(cls, kw, kind, tmp_path):
    model = fitted(cls, **(kw or CNN))
    path, parity = export_model(model, tmp_path / "part", kind, images=IMAGES)
    print(parity)
    assert parity.ok and parity.worst < 3e-5
    assert {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}


# Transformers at another size

def test_registered():
    assert type(create_model("subspace_ad", **CNN)) is SubspaceAd and type(create_model("anomaly_dino", **CNN)) is AnomalyDino
    assert middle_blocks(40) == [*range(22, 29)] and all(0 <= min(middle_blocks(n)) <= max(middle_blocks(n)) < n for n in range(1, 50))


def test_published_defaults():
    s, d = SubspaceAd(), AnomalyDino()
    assert s.backbone.layers == [f"blocks.{n}" for n in range(22, 29)] and s.grid() == (48, 48) and s.dims == 1536 and len(s.angles) == 31
    assert d.backbone.layers == ["blocks.11"] and d.grid() == (32, 32) and d.backbone.kind.norm
    assert not s.built and not hasattr(d, "net")  # nothing fetched


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (320, 320)])
@pytest.mark.parametrize("norm", [True, False])
def test_a_file_of_weights_at_any_size(tmp_path, size, norm):
    whole = timm.create_model("vit_tiny_patch16_224").eval()
    torch.nn.init.normal_(whole.pos_embed)
    torch.nn.init.normal_(whole.norm.weight)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    b = Backbone("vit_tiny_patch16_224", weights=tmp_path / "vit.safetensors", strides=(16,), image_size=size, norm=norm).build()
    assert not any(p.requires_grad for p in b.parameters())
    whole.set_input_size(img_size=size)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        want = whole.forward_intermediates(x, indices=[11], norm=norm, intermediates_only=True)[0]
    torch.testing.assert_close(b(x)[0], want)
    again = Backbone("vit_tiny_patch16_224", strides=(16,), image_size=size, norm=norm).build(load_weights=False)
    again.load_state_dict(b.state_dict())
    assert torch.equal(again(x)[0], b(x)[0])


@pytest.mark.parametrize("name,size", [("vit_small_patch16_dinov3", (64, 96)), ("deit_tiny_patch16_224", (64, 96)), ("eva02_tiny_patch14_224", (56, 84)),
                                       ("vit_small_patch14_reg4_dinov2", (56, 84))])
def test_families_of_transformers(name, size):
    b = Backbone(name, weights="random", layers=[0, 3], image_size=size).build()
    assert b.blocks == 12 and [o.shape[2:] for o in b(torch.zeros(1, 3, *size))] == [(4, 6)]*2


def test_size_and_norm_are_for_transformers_alone():
    x = torch.rand(1, 3, 64, 96)
    for name in ("resnet18", "convnext_atto"):
        a, b = (Backbone(name, weights="random", **kw).build() for kw in ({}, dict(image_size=(64, 96), norm=True)))
        assert a.blocks == b.blocks == 0 and all(torch.equal(p, q) for p, q in zip(a(x), b(x)))
    at_own = Backbone("vit_tiny_patch16_224", weights="random", strides=(16,)).build()
    assert at_own(torch.zeros(1, 3, 224, 224))[0].shape == (1, 192, 14, 14)
