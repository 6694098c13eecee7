"""A fit by two processes, as a user's script: `python share_a_fit.py FOLDER_OF_IMAGES OUT`. Each process writes what it ended with into OUT."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from anomnb.core.errors import AnomnbError
from anomnb.data.read import list_images
from anomnb.engine.engine import Engine
from anomnb.models import Dfkde, Padim, Patchcore

BACKBONE = dict(backbone="tf_efficientnet_lite0", image_size=64)
CASES = {  # name: (class, arguments, images of a first fit, of a partial one, engine)
    "padim": (Padim, dict(channels=20), 7, 0, {}),
    "padim one each": (Padim, dict(channels=20), 2, 0, {}),
    "padim goes on": (Padim, dict(channels=20), 4, 5, {}),
    "dfkde": (Dfkde, {}, 5, 4, {}),
    "patchcore": (Patchcore, {}, 9, 0, dict(batch_size=2)),
    "patchcore bounded": (Patchcore, {}, 12, 0, dict(batch_size=1, max_memory=1_700_000)),
    "patchcore alone": (Patchcore, dict(coreset_ratio=1.0), 1, 0, {}),
}


def models(images, **engine):
    "The model of each case, fitted"
    for name, (cls, kw, first, more, own) in CASES.items():
        e = Engine(quiet=True, **own, **engine)
        model = e.fit(cls(**BACKBONE, **kw), images[:first], calibrate=False)
        yield name, e.partial_fit(model, images[first:first + more], calibrate=False) if more else model


def said(call):
    try:
        call()
        return ""
    except AnomnbError as e:
        return str(e)


def failures(images, **engine):
    "What each process says of images that only one of them reads, and whether the model is as it was"
    e = Engine(quiet=True, batch_size=1, num_workers=0, **engine)
    model, broken = e.fit(Padim(**BACKBONE, channels=5), images[:4], calibrate=False), np.full((8, 8), np.nan)
    before = [model.accumulator, model.rules, model.fitted_images, model.net.mean, model.net.factor]
    spoiled = type("Spoiled", (Padim,), dict(features=lambda self, x: Padim.features(self, x)/(x.mean() - x[0, 0, 0, 0]).square()))
    found = dict(
        broken=said(lambda: e.partial_fit(model, [*images[:3], broken], calibrate=False)),
        skipped=len(e.fit(Padim(**BACKBONE, channels=5), [*images[:3], broken], calibrate=False, on_error="skip").fitted_images),
        nothing=said(lambda: e.fit(Padim(**BACKBONE, channels=5), [broken]*3, calibrate=False, on_error="skip")),
        infinite=said(lambda: e.fit(spoiled(**BACKBONE, channels=5), [*images[:3], np.zeros((8, 8, 3), np.uint8)], calibrate=False)))
    found["as it was"] = all(a is b for a, b in zip(before, [model.accumulator, model.rules, model.fitted_images, model.net.mean, model.net.factor]))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    images, out, rank = list_images(sys.argv[1]), Path(sys.argv[2]), os.environ.get("LOCAL_RANK", "0")
    two = dict(devices=2, strategy="ddp", accelerator="cpu")
    for name, model in models(images, **two):
        model.save(out / f"{name}.{rank}.safetensors", resumable=True)
    calibrated = Engine(quiet=True, **two).fit(Padim(**BACKBONE, channels=5), images)
    found = dict(failures(images, **two), threshold=calibrated.rules[""].threshold)
    (out / f"{rank}.json").write_text(json.dumps(found))
