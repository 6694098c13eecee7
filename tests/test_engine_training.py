"""Training as the engine runs it: what a fit ends with, what it refuses, and that a fit goes on where it stopped."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.data.toy import draw_good
from anomnb.engine.engine import Engine
from anomnb.models.fre import Fre
from anomnb.models.stfpm import Stfpm
from anomnb.models.trained import LossNotFinite

pytestmark = pytest.mark.filterwarnings("ignore:.* random weights")
GOOD = [draw_good(0, "training", i, 64) for i in range(20)]
TINY = dict(backbone="resnet18", weights="random", image_size=64)


def engine(**kw): return Engine(**{**dict(quiet=True, num_workers=0, accelerator="cpu", batch_size=4, max_epochs=4), **kw})
def fre(**kw): return Fre(**{**TINY, "latent": 6, **kw})
def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Breaking(Fre):
    "A loss that is no number from some epoch on"
    broken_from, registry_name = 2, None

    def loss(self, x, batch):
        loss = super().loss(x, batch)
        return loss*float("nan") if self.training and self.current_epoch >= self.broken_from else loss


class Rising(Fre):
    "A validation loss that is least in the second epoch"
    def loss(self, x, batch):
        loss = super().loss(x, batch)
        return loss if self.training else 0*loss + abs(self.current_epoch - 1) + 1.


def breaking(at):
    model = Breaking(**TINY, latent=6)
    model.broken_from = at
    return model


def test_a_loss_that_is_no_number_costs_an_epoch(capsys):
    model = engine(quiet=False).fit(breaking(2), GOOD, calibrate=False)
    assert model.fitted and len(model.history) == 2 and torch.isfinite(model(torch.rand(1, 3, 64, 64)).score).all()
    assert "the loss is nan" in capsys.readouterr().out
    good = engine(max_epochs=2).fit(breaking(9), GOOD, calibrate=False)
    assert same(model, good)


def test_with_nothing_to_go_back_to_it_is_an_error():
    with pytest.raises(LossNotFinite, match="nan on .*learning rate"): engine().fit(breaking(0), GOOD, calibrate=False)


def test_it_stops_early_by_patience():
    model = Rising(**TINY, latent=6)
    model.patience = 3
    engine(max_epochs=50).fit(model, GOOD, calibrate=False)
    assert len(model.history) == 5


def test_best_and_last():
    last, best, two = (engine(keep=k, max_epochs=n).fit(Rising(**TINY, latent=6), GOOD, calibrate=False) for k, n in (("last", 4), ("best", 4), ("last", 2)))
    assert same(best, two) and not same(best, last)


@pytest.mark.parametrize("cache", ["disk", None])
def test_kept_features_change_nothing(cache):
    assert same(engine().fit(Stfpm(**TINY), GOOD, calibrate=False), engine(cache_features=cache).fit(Stfpm(**TINY), GOOD, calibrate=False))


def test_too_many_features_are_not_kept(capsys):
    a = engine(quiet=False, max_memory="1MB").fit(Stfpm(**TINY), GOOD, calibrate=False)
    assert "features are not kept: " in (said := capsys.readouterr().out) and 'cache_features="disk"' in said
    assert same(a, engine().fit(Stfpm(**TINY), GOOD, calibrate=False))


def test_time_ends_a_fit():
    model = engine(max_epochs=100_000, max_time={"seconds": 2}).fit(fre(), GOOD, calibrate=False)
    assert model.fitted and 0 < len(model.history) < 100_000


def test_max_batches_ends_a_fit():
    model, steps = fre(), []
    loss = model.loss
    model.loss = lambda x, batch: (steps.append(model.training), loss(x, batch))[1]
    engine(max_batches=7, max_epochs=100).fit(model, GOOD, calibrate=False)
    assert sum(steps) == 7 and model.total_batches == 7


@pytest.mark.parametrize("val", [True, False])
def test_a_fit_goes_on_to_the_same_weights(val, tmp_path):
    data = GOOD if val else list(GOOD[:6])
    whole = engine(max_epochs=4).fit(fre(), data, calibrate=False)
    engine(max_epochs=2, checkpoints=tmp_path).fit(fre(), data, calibrate=False)
    going_on = engine(max_epochs=4).fit(fre(), data, calibrate=False, resume=tmp_path / "last.ckpt")
    assert same(whole, going_on) and going_on.history == whole.history


@pytest.mark.parametrize("cls", [Rising, Breaking])
def test_last_is_that_of_the_last_epoch_that_ended(cls, tmp_path):
    model = cls(**TINY, latent=6)
    model.broken_from = 3
    engine(max_epochs=5, checkpoints=tmp_path).fit(model, GOOD, calibrate=False)
    ended = 3 if cls is Breaking else 5
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == ended - 1 and (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("change, why", [
    (dict(model=lambda: Stfpm(**TINY)), "model 'fre', here 'stfpm'"), (dict(model=lambda: fre(latent=5)), "latent 6, here 5"),
    (dict(model=lambda: fre(image_size=96)), "image_size 64, here 96"), (dict(data=GOOD[:10]), "images"),
    (dict(data=[np.rot90(o).copy() for o in GOOD[:15]]), "images"), (dict(path="gone.ckpt"), "no checkpoint .*gone.ckpt"),
    (dict(path="broken.ckpt"), "broken.ckpt' is no checkpoint")])
def test_it_goes_on_with_the_same_fit_alone(change, why, tmp_path):
    engine(max_epochs=2, checkpoints=tmp_path).fit(fre(), GOOD, calibrate=False)
    (tmp_path / "broken.ckpt").write_bytes(b"PK no zip")
    model = change.get("model", fre)()
    with pytest.raises(AnomnbError, match=why):
        engine().fit(model, change.get("data", GOOD), calibrate=False, resume=tmp_path / change.get("path", "last.ckpt"))
    assert not model.fitted


def test_too_few_images_for_a_batch_norm():
    with pytest.raises(AnomnbError, match="train with two images or more"):
        engine().fit(Stfpm(backbone="resnet18", weights="random", image_size=16), GOOD[:1], calibrate=False)


def test_refit_learns_everything_and_says_so():
    model = engine().fit(fre(), GOOD, refit="all")
    assert len(model.fitted_images) == len(GOOD) and model.rules[""].approximate and len(model.calibration_images) == 5
    assert not same(model, engine().fit(fre(), GOOD))
