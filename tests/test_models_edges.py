"""Every statistical detector at the edges of what can be fitted: it learns something finite, or says in plain words why it can't."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.core.names import create_model, list_models, model_arguments, model_class
from anomnb.engine.engine import Engine
from anomnb.models.base import FitOnce

SMALL = dict(backbone="resnet18", weights="random", image_size=24)  # 3×3 places at stride 8
OWN = dict(dfm=dict(pool=1), patchcore=dict(coreset_ratio=0.5))  # where the default is more than these maps hold
NAMES = [n for n in list_models() if issubclass(model_class(n), FitOnce) and "layers" in model_arguments(n)]  # those that stand on any backbone
g = np.random.default_rng(0)
NOISE = [g.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(6)]
CASES = dict(noise=NOISE, one=NOISE[:1], same=NOISE[:1]*6, black=[np.zeros((24, 24, 3), np.uint8)]*6, two=NOISE[:2], copies=NOISE[:2]*4)
WORDS = ("two images", "two good images", "at least", "neighbors", "equal", "same", "more good images", "explain", "differ", "vary", "variance", "smoothed")


@pytest.mark.filterwarnings("ignore:backbone 'resnet18' has random weights")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_it_fits_or_says_why_not(name, case):
    model = create_model(name, **SMALL, **OWN.get(name, {}))
    try:
        Engine(quiet=True).fit(model, CASES[case], calibrate=False)
    except AnomnbError as e:
        assert case != "noise" and any(w in str(e) for w in WORDS), str(e)
        assert not model.fitted
        return
    with torch.inference_mode():
        raw = model(torch.rand(2, 3, 30, 20))
    assert torch.isfinite(raw.score).all() and (raw.map is None or (torch.isfinite(raw.map).all() and raw.map.shape == (2, 24, 24)))


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_are_named(name, monkeypatch):
    model, broken = create_model(name, **SMALL, **OWN.get(name, {})), []
    model.build()
    embed = model.net.embed

    def spoiled(x):
        e = embed(x).clone()
        e[-1] = float("nan")
        broken.append(len(e))
        return e
    monkeypatch.setattr(model.net, "embed", spoiled)
    with pytest.raises(AnomnbError, match="not finite") as e:
        Engine(quiet=True, batch_size=3).fit(model, NOISE, calibrate=False)
    assert broken and "image" in str(e.value) and not model.fitted
