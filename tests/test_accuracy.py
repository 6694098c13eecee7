"""Accuracy on real images, where they are: what `anomnb_benchmark road` must reach on hazelnut_toy."""
import pytest

from anomnb.data.folder import Folder
from anomnb.engine.accuracy import TO_REACH, measured_models, model_rows


@pytest.mark.parametrize("name", ["PaDiM", "PatchCore 1 %"])
def test_hazelnut_reaches_what_is_stated(needs_data, needs_weights, name):
    data = Folder(needs_data("hazelnut_toy"))
    rows = model_rows(data, name, "resnet18", measured_models("resnet18", str(needs_weights()))[name](), "hazelnut_toy")
    stated = [r for r in rows if r.reach is not None]
    assert len(stated) == len(TO_REACH["hazelnut_toy", name, "resnet18"]) and all(r.reached for r in stated), "\n".join(map(str, rows))
