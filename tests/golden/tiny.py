"""The small detector of the golden files: `python tests/golden/tiny.py` writes them again (only for a new format of the bundle)."""
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anomnb.data.read import to_unit
from anomnb.models.backbones import register_backbone
from anomnb.models.patchcore import Patchcore
from anomnb.processing.thresholds import conformal_rule

HERE = Path(__file__).parent


class Pyramid(nn.Module):
    "Features at strides 8 and 16"

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 12, 8, 8), nn.Conv2d(12, 16, 2, 2)

    def forward(self, x):
        fine = self.fine(x).relu()
        return [fine, self.coarse(fine).relu()]


register_backbone("golden_pyramid", factory := lambda weights: Pyramid())


def draw(height, width, spot=False, shift=0):
    "A pattern that needs no random numbers, uint8 H×W×3"
    y, x = np.mgrid[:height, :width]
    image = np.stack([(7 * x + 5 * y + shift) % 64 + 90, (x + 3 * y + 2 * shift) % 96 + 60, 60 + 80 * ((x // 8 + y // 8 + shift) % 2)], -1)
    if spot:
        image[height // 3: height // 2, width // 4: width // 2] = (230, 40, 200)
    return image.astype(np.uint8)


def images():
    return [draw(32, 32), draw(32, 32, spot=True), draw(50, 41, shift=3), draw(70, 90, spot=True)]


def unit(image):
    return torch.from_numpy(to_unit(image))[None]


def fitted(images=8, **kwargs):
    "A fitted PatchCore in milliseconds"
    torch.manual_seed(0)
    model = Patchcore(**{**dict(backbone="golden_pyramid", weights="random", image_size=32, coreset_ratio=0.5, num_neighbors=3), **kwargs})
    model.build()
    good = [unit(draw(32, 32, shift=i)) for i in range(images)]
    model.accumulator = model.new_accumulator(len(good), None)
    for o in good:
        model.accumulator.update(model.features(o))
    model.finish().eval()
    with torch.inference_mode():
        scores = [model(unit(draw(32, 32, shift=20 + i))).score.item() for i in range(4)]
    model.rules = {"": conformal_rule(scores, peaks=scores, strict=False)}
    model.metrics = {"image_AUROC": 0.5}
    model.fitted_images = [{"sha256": "0" * 64, "group": "lot 1"}]
    return model


def answers(model):
    with torch.inference_mode():
        raws = [model(unit(o)) for o in images()]
    return dict(score=[r.score.item() for r in raws], top=[r.map.max().item() for r in raws], mean=[r.map.mean().item() for r in raws])


if __name__ == "__main__":
    model = fitted()
    model.save(HERE / "patchcore_format1.safetensors")
    (HERE / "patchcore_format1.json").write_text(json.dumps({**answers(model), "hash": model.model_hash}, indent=1) + "\n")
