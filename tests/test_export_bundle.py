"""The bundle: one model, one row of bytes; whatever else lies under its name is answered with the cure."""
import json
import pickle
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import tiny  # noqa: E402

from anomnb.core.errors import AnomnbError, AnomnbFileError  # noqa: E402
from anomnb.core.names import MODELS, register_model  # noqa: E402
from anomnb.export.bundle import load, read_header, save  # noqa: E402
from anomnb.models.backbones import BACKBONES  # noqa: E402
from anomnb.models.base import AnomalyModule  # noqa: E402
from anomnb.models.patchcore import Patchcore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
GOLDEN = Path(__file__).parent / "golden" / "patchcore_format1.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny.fitted()


@pytest.fixture()
def path(model, tmp_path):
    return save(model, tmp_path / "part.safetensors")


def same(a, b):
    with torch.inference_mode():
        for image in tiny.images():
            ours, theirs = a(tiny.unit(image)), b(tiny.unit(image))
            assert torch.equal(ours.score, theirs.score) and torch.equal(ours.map, theirs.map)


def test_the_same_model_gives_the_same_bytes(model, path, tmp_path):
    twin = tiny.fitted()
    assert save(twin, tmp_path / "twin.safetensors").read_bytes() == path.read_bytes()
    assert save(load(path), tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert twin.model_hash == model.model_hash == load(path).model_hash


def test_save_and_load_change_no_bit(model, path):
    again = load(path)
    same(model, again)
    assert (again.rules, again.metrics, again.fitted_images, again.args) == (model.rules, model.metrics, model.fitted_images, model.args)
    assert again.fitted and not again.training


def test_golden_file_of_format_1():
    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    model = load(GOLDEN)
    found = tiny.answers(model)
    assert model.model_hash == expected.pop("hash")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * np.ptp(values))


def test_no_network_no_weights_no_training_data(tmp_path, monkeypatch):
    model = Patchcore("tf_efficientnet_lite0", image_size=32, num_neighbors=1).build()
    model.net.learn(torch.randn(5, sum(model.backbone.channels)))
    model.fitted = True
    path = save(model, tmp_path / "a.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("a bundle needs no source of weights and no network")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr("anomnb.models.backbones.lite0_weights", refuse)
    monkeypatch.setattr("anomnb.models.backbones.read_weights", refuse)
    same(model, load(path))


def test_loading_runs_no_pickle(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a bundle is no pickle")
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load(path)


def test_a_local_file_of_weights_leaves_no_path(tmp_path):
    from safetensors.torch import save_file
    weights = tmp_path / "secret_place" / "weights.safetensors"
    weights.parent.mkdir()
    drawn = Patchcore("resnet18", weights="random", image_size=32).build()
    save_file({k: v.clone() for k, v in drawn.backbone.net.state_dict().items()}, weights)
    model = Patchcore("resnet18", weights=str(weights), image_size=32, num_neighbors=1).build()
    model.net.learn(torch.randn(5, sum(model.backbone.channels)))
    model.fitted = True
    path = save(model, tmp_path / "a.safetensors")
    assert b"secret_place" not in path.read_bytes()
    assert read_header(path)["arguments"]["weights"].startswith("local file sha256:")
    weights.unlink()
    again = load(path)
    same(model, again)
    assert save(again, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_a_module_as_backbone_is_asked_for(tmp_path):
    module = tiny.Pyramid()
    model = tiny.fitted(backbone=module, weights=None)
    path = save(model, tmp_path / "own.safetensors")
    with pytest.raises(AnomnbError, match=r"Pyramid\): give it, load\(path, backbone=module\)"):
        load(path)
    again = load(path, backbone=tiny.Pyramid())
    same(model, again)
    assert save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(AnomnbError, match="don't fit the Patchcore"):
        load(path, backbone=torch.nn.Sequential(torch.nn.Conv2d(3, 28, 8, 8)))


def test_a_backbone_that_is_not_wanted(path):
    with pytest.raises(AnomnbError, match="brings its own backbone"):
        load(path, backbone=tiny.Pyramid())


def test_a_backbone_that_is_not_registered_here(path):
    kept = BACKBONES.pop("golden_pyramid")
    try:
        with pytest.raises(AnomnbError, match="unknown backbone 'golden_pyramid'.*register_backbone"):
            load(path)
    finally:
        BACKBONES["golden_pyramid"] = kept


def test_resumable(tmp_path):
    model = tiny.fitted()
    plain, more = save(model, tmp_path / "plain.safetensors"), save(model, tmp_path / "more.safetensors", resumable=True)
    assert read_header(plain)["hash"] == read_header(more)["hash"]
    assert load(plain).accumulator is None
    again = load(more)
    assert torch.equal(again.accumulator.state()["rows"], model.accumulator.state()["rows"])
    extra = tiny.unit(tiny.draw(32, 32, shift=33))
    for o in (model, again):
        o.accumulator.update(o.features(extra))
        o.finish()
    same(model, again)
    with pytest.raises(AnomnbError, match="resumable=True right after the fit"):
        save(load(plain), tmp_path / "b.safetensors", resumable=True)


def test_not_fitted(tmp_path):
    with pytest.raises(AnomnbError, match="not fitted, there is nothing to save"):
        save(Patchcore("golden_pyramid"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_class_without_a_name(model, tmp_path):
    class Mine(Patchcore):
        pass
    own = Mine("golden_pyramid", image_size=32).build()
    own.fitted = True
    with pytest.raises(AnomnbError, match="register_model\\('my_mine', Mine\\)"):
        save(own, tmp_path / "a.safetensors")


def test_missing_file_offers_the_nearest(path):
    with pytest.raises(AnomnbFileError, match=r"did you mean '.*part\.safetensors'"):
        load(path.with_name("prat.safetensors"))
    with pytest.raises(AnomnbFileError, match="is a folder"):
        load(path.parent)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(path.parent / "nowhere" / "part.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 300, 1500, 5000, -1])
def test_truncated(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(AnomnbError, match="cut short or damaged|empty|no safetensors"):
        load(path)


def test_every_altered_byte_is_found(path):
    """All bytes of the length and of both headers, each in one of three ways, and every 97th of the tensors."""
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(head), *range(head, len(data), 97), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= (1, 0x20, 0x80)[at % 3]
        path.write_bytes(changed)
        with pytest.raises(AnomnbError):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(AnomnbError, match="cut short or damaged"):
        load(path)


def test_a_newer_format(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(rb'\"format\":1', rb'\"format\":9'))
    with pytest.raises(AnomnbError, match="newer version of anomnb .format 9.*upgrade"):
        load(path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_under_its_name(tmp_path, protocol):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(AnomnbError, match="pickle.*refused"):
        load(path)


def test_a_zip_under_its_name(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "b.safetensors", "w") as f:
        f.writestr("x", "y")
    for name in ("a", "b"):
        with pytest.raises(AnomnbError, match="zip.*refused"):
            load(tmp_path / f"{name}.safetensors")


def test_other_files_under_its_name(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "a.safetensors"
    path.write_text("this is a text, and not a short one")
    with pytest.raises(AnomnbError, match="no safetensors file, it begins with b'this is "):
        load(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(AnomnbError, match="without a header of anomnb's"):
        load(path)


class Counts(AnomalyModule):
    def __init__(self, image_size=32, old=1): super().__init__()  # noqa: E704

    def make_net(self, load_weights):
        from anomnb.processing.pre import Pre
        self.pre, self.net = Pre(self.args["image_size"]), torch.nn.Identity()


@pytest.fixture()
def counted(tmp_path):
    register_model("counts", Counts)
    model = Counts().build()
    model.fitted = True
    yield save(model, tmp_path / "counts.safetensors")
    MODELS.pop("counts", None)


def test_a_model_that_is_not_registered_here(counted):
    load(counted)
    del MODELS["counts"]
    with pytest.raises(AnomnbError, match=r"call register_model\('counts', TheClass\) before loading"):
        load(counted)


def test_arguments_that_the_class_does_not_know(counted):
    class Later(AnomalyModule):
        def __init__(self, image_size=32, new=1): super().__init__()  # noqa: E704
    MODELS["counts"] = dict(cls=Later, family="", tiny={})
    with pytest.raises(AnomnbError, match="can't be built here: unknown argument of Later 'old'"):
        load(counted)


def test_an_argument_that_is_no_json(tmp_path):
    register_model("counts", Counts)
    model = Counts(old=print).build()
    model.fitted = True
    with pytest.raises(AnomnbError, match="old=<built-in function print> can't be saved"):
        save(model, tmp_path / "a.safetensors")
    del MODELS["counts"]


def test_two_names_of_one_tensor_are_saved_once(tmp_path):
    class Shared(AnomalyModule):
        def __init__(self): super().__init__()  # noqa: E704

        def make_net(self, load_weights):
            self.pre, self.net = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
            self.net[1].weight, self.alias = self.net[0].weight, self.net[0]
    register_model("shared", Shared)
    model = Shared().build()
    model.fitted = True
    again = load(save(model, tmp_path / "a.safetensors"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    del MODELS["shared"]
