"EfficientAD against its equations in numpy, its teacher, its penalty images, as a learner, saved, exported, and on bad input"
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit
from PIL import Image
from torchvision.transforms import functional as tv

from anomnb.core.errors import AnomnbError, AnomnbFileError
from anomnb.core.seeds import rng
from anomnb.data.read import Item
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load
from anomnb.export.parity import export_model
from anomnb.models.backbones import Backbone
from anomnb.models.efficientad import EfficientAd, EfficientAdNet, autoencoder, jitter
from anomnb.models.patch_network import EDGE, WIDTH, Penalty, distil_teacher, pdn, places, shared_file, wanted_features
from anomnb.models.weights import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:.* random weights")
TINY = dict(weights="random", image_size=48, lr=0.001, hard=0.9)
GOOD = [draw_good(0, "efficientad", i, 96) for i in range(12)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, batches=4, batch_size=2, **kw):
    engine = Engine(quiet=True, num_workers=0, batch_size=batch_size, max_batches=batches)
    return engine.fit(EfficientAd(**{**TINY, **kw}), images, calibrate=False)


def write(folder, n=3, seed="files", **kw):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray(draw_good(0, seed, i, 64)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def fitted():
    return fit(batches=60)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    few = dict(batch_size=4, image_size=48, lr=0.001, quiet=True)
    return {n: distil_teacher(lite(), GOOD, folder / f"{n}.safetensors", batches=n, **few) for n in (0, 12)}


def lite():
    return Backbone("tf_efficientnet_lite0").build()


@pytest.mark.parametrize("model_size", ["small", "medium"])
def test_the_grid(model_size):
    with torch.device("meta"):
        net = pdn(model_size)
        assert net(torch.empty(2, 3, 256, 256)).shape == (2, 384, 56, 56) and places((256, 256)) == (56, 56)
        assert net(torch.empty(1, 3, 33, 70)).shape[-2:] == places((33, 70)) and places((33, 70))[0] == 1
        assert pdn(model_size, 768)(torch.empty(1, 3, 64, 64)).shape == (1, 768, 8, 8)
        assert pdn(model_size, padding=True)(torch.empty(1, 3, 256, 256)).shape == (1, 384, 64, 64)
        assert autoencoder((256, 256))(torch.empty(1, 3, 256, 256)).shape == (1, 384, 56, 56)
        for size in ((64, 64), (64, 100), (50, 33), (255, 321)):
            assert autoencoder(size)(torch.empty(1, 3, *size)).shape[-2:] == places(size) == net(torch.empty(1, 3, *size)).shape[-2:]


def test_the_padded_network_agrees_inside():
    net, padded = pdn("medium", 8), pdn("medium", 8, padding=True)
    padded.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        a, b = net(x), padded(x)
    assert (a - b[..., EDGE:-EDGE, EDGE:-EDGE]).abs().max() <= 1e-5*a.abs().max()


def test_what_is_left_goes_through_one_place():
    for size in ((256, 256), (64, 100), (33, 48)):
        with torch.device("meta"):
            assert autoencoder(size)[:11](torch.empty(1, 3, *size)).shape == (1, 64, 1, 1)


def distances(model, x):
    "Both squared distances at each place, float64, and what the networks say"
    with torch.no_grad():
        x = model.pre(x)
        t, s, a = (net(x).double().numpy() for net in (model.net.teacher, model.net.student, model.net.autoencoder))
    t = (t - model.net.mean.numpy())/model.net.std.numpy()
    return (t - s[:, :WIDTH])**2, (a - s[:, WIDTH:])**2, (t - a)**2


@pytest.mark.parametrize("hard", [0.9, 0.999])
def test_loss_is_that_of_the_paper(fitted, hard, monkeypatch):
    monkeypatch.setitem(fitted.args, "hard", hard)
    x, total = unit(ODD)[..., :48, :48].contiguous(), 0
    for i in range(3):
        st, stae, ae = distances(fitted, x[i:i + 1])
        with torch.no_grad():
            strange = fitted.penalty.draw(rng(0, "penalty", "val", 7 + i), (48, 48))
            penalty = fitted.net.student(fitted.pre(strange[None]))[:, :WIDTH].square().mean()
        total += st[st >= np.quantile(st, hard)].mean() + stae.mean() + ae.mean() + float(penalty)
    with torch.no_grad():
        loss = fitted.eval().loss(x, SimpleNamespace(index=[7, 8, 9]))
        alone = [fitted.loss(x[i:i + 1], SimpleNamespace(index=[7 + i])) for i in range(3)]
    assert abs(float(loss) - total/3) < 1e-4*total/3  # float32 networks
    assert abs(float(loss) - float(sum(alone))/3) < 1e-4*float(loss)


def test_training_changes_the_image_and_validation_does_not(fitted):
    x = unit(ODD[:2])[..., :48, :48].contiguous()
    seen, strange = fitted.eval().drawn(x, [0, 1])
    assert torch.equal(seen, x) and strange.shape == x.shape
    assert torch.equal(strange, fitted.drawn(x, [0, 1])[1])
    fitted.train()
    seen, other = fitted.drawn(x, [0, 1])
    assert not torch.equal(seen, x) and not torch.equal(other, strange)
    assert torch.equal(fitted.drawn(x[1:], [1])[0], seen[1:])  # whoever stands beside it
    assert not fitted.net.teacher.training and fitted.net.student.training
    fitted.eval()


def test_jitter_is_one_of_three():
    x = unit(ODD[:1])[0]
    for i in range(12):
        g = rng(0, "jitter", i)
        factor, which = g.uniform(0.8, 1.2), g.integers(3)
        wanted = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[which](x, factor)
        assert (jitter(rng(0, "jitter", i), x) - wanted).abs().max() < 1e-3  # torchvision rounds the weights of grey


def test_teacher_is_normalised_over_the_good_images():
    model = EfficientAd(**TINY).build().eval()
    batches = unit(GOOD)[..., :48, :48].split(5)
    with torch.no_grad():
        model.prepare(batches)
        f = torch.cat([model.net.teacher(model.pre(o)) for o in batches]).double().numpy()
    np.testing.assert_allclose(model.net.mean.flatten(), f.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(model.net.std.flatten(), f.std((0, 2, 3)), rtol=1e-4)


def test_quantiles_of_all_places():
    model = EfficientAd(**TINY).build().eval()
    batches = unit(GOOD)[..., :48, :48].contiguous().split(5)
    with torch.no_grad():
        model.settle(batches)
    st, stae, _ = distances(model, torch.cat(batches))
    for own, d in zip(model.net.quantiles, (st, stae)):
        np.testing.assert_allclose(own, np.quantile(d.mean(1), (0.9, 0.995)), rtol=1e-4)  # float32 maps
    with torch.no_grad():
        low, high = model.net.quantiles.unbind(1)
        maps = 0.1*(model.net.apart(model.pre(torch.cat(batches))) - low[:, None, None])/(high - low)[:, None, None]
    np.testing.assert_allclose([(m < 0).float().mean() for m in maps.transpose(0, 1)], 0.9, atol=0.01)
    np.testing.assert_allclose([(m < 0.1).float().mean() for m in maps.transpose(0, 1)], 0.995, atol=0.01)


def test_map_is_the_mean_of_both(fitted):
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    (st, stae, _), q = distances(fitted, unit(ODD)), fitted.net.quantiles.double().numpy()
    both = [0.1*(d.mean(1) - low)/(high - low) for d, (low, high) in zip((st, stae), q)]
    map = np.pad(0.5*both[0] + 0.5*both[1], ((0, 0), (EDGE, EDGE), (EDGE, EDGE)), mode="edge")
    map = F.interpolate(torch.from_numpy(map)[:, None], size=(48, 48), mode="bilinear", align_corners=False)[:, 0]
    assert map.shape == raw.map.shape and (raw.map - map).abs().max() < 1e-3*np.ptp(map.numpy())  # distances of float32 features
    assert torch.equal(raw.score, raw.map.flatten(1).amax(1))


def test_equal_validation_places_give_a_finite_map():
    net = EfficientAdNet("small", (33, 33)).eval()
    net.quantiles.fill_(0.5)
    with torch.no_grad():
        assert torch.isfinite(net(torch.rand(1, 3, 33, 33)).map).all()


@pytest.mark.parametrize("place", ["same", "copied"])
def test_good_images_are_no_penalty(place, tmp_path):
    good, strange = write(tmp_path / "good"), write(tmp_path / "strange", seed="other")
    assert shared_file(strange, good) is None and Penalty(tmp_path / "strange", [Item("a", good[0])]).files == strange
    folder = tmp_path / ("good" if place == "same" else "strange")
    if place == "copied":
        (tmp_path / "strange/deep").mkdir()
        shutil.copy(good[1], tmp_path / "strange/deep/renamed.png")
    with pytest.raises(AnomnbError, match="is a training image too"):
        fit([*good, ODD[0]], penalty=folder)


def test_penalty_images_of_a_folder(tmp_path):
    write(tmp_path, 2)
    p = Penalty(tmp_path)
    drawn = [p.draw(rng(0, i), (40, 56)) for i in range(20)]
    assert all(o.shape == (3, 40, 56) and 0 <= o.min() and o.max() <= 1 for o in drawn)
    assert torch.equal(drawn[3], p.draw(rng(0, 3), (40, 56)))
    assert 0 < sum(bool((o[0] == o[1]).all()) for o in drawn) < 20  # grey ones among them
    model = fit(batches=1, penalty=tmp_path)
    assert model.penalty.files and model.args["penalty"] == str(tmp_path)


def test_penalty_folders_that_can_not_be(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AnomnbFileError, match="leave `penalty` out"):
            fit(penalty=folder)


def test_a_teacher_has_to_be_named(teachers, tmp_path):
    with pytest.raises(AnomnbError, match="(?s)distil_teacher.*weights='random'"):
        fit(weights=None)
    with pytest.raises(AnomnbFileError, match="no file of weights"):
        fit(weights=tmp_path / "none.safetensors")
    with pytest.raises(AnomnbError, match=r"don't fit 'the medium teacher', lacking 10.weight \(384, 512, 4, 4\)"):
        fit(weights=teachers[0], model_size="medium")
    torch.save(pdn(width=128).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(AnomnbError, match=r"having 8.weight \(128, 256, 4, 4\).* where 8.weight \(384, 256, 4, 4\)"):
        fit(weights=str(tmp_path / "narrow.pth"))
    with pytest.warns(UserWarning, match="teacher has random weights"):
        EfficientAd(weights="random", image_size=48).build()


def test_distilling_teaches(teachers):
    backbone, x = lite(), F.interpolate(unit(ODD), size=96)
    wanted = wanted_features(backbone, x)
    assert wanted.shape == (3, 384, 12, 12)
    mean, std = wanted.mean((0, 2, 3), keepdim=True), wanted.std((0, 2, 3), keepdim=True)

    def far(path):
        net = pdn(padding=True)
        net.load_state_dict(read_weights(path))
        pre = EfficientAd(**TINY).pre
        with torch.no_grad():
            return float(F.mse_loss(net(pre(x)), (wanted - mean)/std))

    assert far(teachers[12]) < 0.8*far(teachers[0])


def test_wanted_features_are_means_of_neighbours():
    "Channels and places as PatchCore: a naive count on a backbone of two plain layers"
    class Two(torch.nn.Module):
        channels, mean, std = [4, 768], (0.5,)*3, (0.25,)*3

        def forward(self, x):
            g = torch.Generator().manual_seed(0)
            return [torch.rand(1, 4, 6, 8, generator=g), torch.rand(1, 768, 3, 4, generator=g)]

    fine, coarse = Two()(None)
    out = wanted_features(Two(), torch.rand(1, 3, 48, 64))
    assert out.shape == (1, 384, 6, 8)
    y, x = 2, 3
    assert abs(float(out[0, 0, y, x] - fine[0, 0, y - 1:y + 2, x - 1:x + 2].mean())) < 1e-6  # 192 places for 4 channels: the first repeats
    assert abs(float(out[0, 191, y, x] - fine[0, 3, y - 1:y + 2, x - 1:x + 2].mean())) < 1e-6
    pooled = F.avg_pool2d(coarse[:, :4].mean(1, keepdim=True), 3, 1, 1)  # 768 channels on 192: four each
    assert torch.allclose(out[0, 192], F.interpolate(pooled, size=(6, 8), mode="bilinear")[0, 0], atol=1e-6)


def test_distilling_twice_writes_the_same(tmp_path):
    kw = dict(batches=2, batch_size=3, image_size=(40, 48), quiet=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = distil_teacher(lite(), GOOD[:5], tmp_path / "a.safetensors", **kw)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    b = distil_teacher(lite(), GOOD[:5], tmp_path / "b.safetensors", **kw)
    c = distil_teacher(lite(), GOOD[:5], tmp_path / "c.safetensors", **kw, seed=1)
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_it_learns_and_the_teacher_does_not(fitted, teachers):
    untrained = EfficientAd(**TINY).build()
    assert all(torch.equal(a, b) for a, b in zip(untrained.net.teacher.parameters(), fitted.net.teacher.parameters()))
    with torch.no_grad():
        untrained.prepare(fitted.pre.resize(unit(GOOD)).split(4))
        x, batch = fitted.pre.resize(unit(ODD[:2])), SimpleNamespace(index=[0, 1])
        assert fitted.eval().loss(x, batch) < 0.7*untrained.eval().loss(x, batch)
    model = fit(batches=2, weights=teachers[12])
    assert all(torch.equal(v, model.net.teacher.state_dict()[k]) for k, v in read_weights(teachers[12]).items())
    assert (model.net.mean != 0).any() and (model.net.quantiles[:, 0] < model.net.quantiles[:, 1]).all()


def test_the_published_schedule():
    model = EfficientAd(**TINY).build()
    model.total_batches = 200
    made = model.configure_optimizers()
    (group,) = made["optimizer"].param_groups
    assert EfficientAd().args["lr"] == 1e-4 and group["weight_decay"] == 1e-5 and made["lr_scheduler"]["interval"] == "step"
    learned = {id(p) for m in (model.net.student, model.net.autoencoder) for p in m.parameters()}
    assert {id(p) for p in group["params"]} == learned
    rates = []
    for _ in range(200):
        rates.append(group["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[:190] == [0.001]*190 and np.allclose(rates[190:], 0.0001)
    assert (model.trainer_defaults, model.batch_size, model.keep) == (dict(max_batches=70_000), 1, "last")


def test_one_seed_one_model():
    a, b, other = fit(batches=2), fit(batches=2), fit(batches=2, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.net.student[0].weight, other.net.student[0].weight)


def test_any_batch(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            alone = fitted(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5*(whole.map.max() - whole.map.min())


def test_images_that_are_not_square():
    model = fit(batches=2, image_size=(40, 72), batch_size=1)
    with torch.inference_mode():
        assert model(torch.rand(2, 3, 50, 90)).map.shape == (2, 40, 72)


def test_medium():
    model = fit(GOOD[:3], batches=1, model_size="medium", image_size=36, batch_size=1)
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 36, 36)).map.shape == (1, 36, 36)


def test_saved_it_needs_no_file(teachers, tmp_path):
    strange, teacher = tmp_path / "strange", shutil.copy(teachers[12], tmp_path / "teacher.safetensors")
    write(strange)
    model = fit(batches=2, weights=teacher, penalty=strange)
    path = model.save(tmp_path / "m.safetensors")
    shutil.rmtree(strange)
    (tmp_path / "teacher.safetensors").unlink()
    again = load(path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with torch.inference_mode():
        ours, theirs = model(unit(ODD)), again(unit(ODD))
    assert torch.equal(ours.map, theirs.map) and torch.equal(ours.score, theirs.score)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_parity(fitted, kind, tmp_path):
    _, parity = export_model(fitted, tmp_path / "m", kind, images=ODD)
    assert parity.ok and {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}


def test_bad_input():
    with pytest.raises(AnomnbError, match="did you mean 'medium'"):
        EfficientAd(model_size="medum")
    with pytest.raises(AnomnbError, match="give at least 33"):
        EfficientAd(image_size=(64, 32))
    with pytest.raises(AnomnbError, match="not fitted"):
        EfficientAd(**TINY)(torch.rand(1, 3, 48, 48))
    with pytest.raises(AnomnbError, match="quantile=2"):
        fit(hard=2)
    with pytest.raises(AnomnbError, match="a file or 'random', not int"):
        EfficientAd(weights=3).build()
