"""ONNX and OpenVINO: the same answer as torch, from files that are whole, in programs without torch."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import tiny  # noqa: E402

from anomnb.core.errors import AnomnbError, AnomnbFileError  # noqa: E402
from anomnb.core.names import MODELS, register_model  # noqa: E402
from anomnb.data.read import to_unit  # noqa: E402
from anomnb.data.toy import draw_defect, draw_good  # noqa: E402
from anomnb.export.inferencer import Inferencer  # noqa: E402
from anomnb.export.onnx import to_onnx  # noqa: E402
from anomnb.export.openvino import to_openvino  # noqa: E402
from anomnb.export.parity import export_model, verify  # noqa: E402
from anomnb.models import nearest  # noqa: E402
from anomnb.models.base import AnomalyModule  # noqa: E402
from anomnb.models.patchcore import Patchcore  # noqa: E402
from anomnb.processing.thresholds import conformal_rule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
IMAGES = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    "PatchCore on real features with a bank of some 500 rows, in all three kinds"
    model = Patchcore("tf_efficientnet_lite0", image_size=64, coreset_ratio=0.8).build()
    model.accumulator = model.new_accumulator(10, None)
    for i in range(10):
        model.accumulator.update(model.features(torch.from_numpy(to_unit(draw_good(0, "fit", i, 96)))[None]))
    model.finish().eval()
    assert 400 < len(model.net.bank) < 600
    with torch.inference_mode():
        raws = [model(torch.from_numpy(to_unit(draw_good(0, "cal", i, 96)))[None]) for i in range(3)]
    model.rules = {"": conformal_rule([r.score.item() for r in raws], peaks=[r.map.max().item() for r in raws], strict=False)}
    folder = tmp_path_factory.mktemp("road")
    made = {kind: export_model(model, folder / "part", kind, images=IMAGES) for kind in ("torch", "onnx", "openvino")}
    return model, folder, made


def test_parity_at_two_sizes_and_two_batches(road):
    for path, parity in road[2].values():
        print(parity)
        assert parity.ok and parity.worst < 1e-5
        assert {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}
    assert road[2]["torch"][1].worst == 0


def test_parity_with_a_bank_of_several_tiles(tmp_path):
    model = tiny.fitted(num_neighbors=5)
    rows = torch.rand(2 * nearest.TILE + 900, model.net.bank.shape[1], generator=torch.Generator().manual_seed(0))
    model.net.learn(rows)
    path, parity = export_model(model, tmp_path / "big", "onnx")
    print(parity)
    assert verify(model, to_openvino(path, tmp_path / "big.xml")).worst < 1e-5 > parity.worst


def test_the_header_travels(road):
    headers = [Inferencer(path).header for path, _ in road[2].values()]
    for h in headers[1:]:
        assert {k: h[k] for k in headers[0]} == headers[0] and h["verified_on"] == "given images"
    assert road[0].model_hash == headers[0]["hash"]


def test_the_same_model_gives_the_same_files(tmp_path):
    a, b = (to_onnx(tiny.fitted(), tmp_path / f"{n}.onnx") for n in "ab")
    assert a.read_bytes() == b.read_bytes() and str(tmp_path).encode() not in a.read_bytes() and b"anomnb/models" not in a.read_bytes()
    one, two = to_openvino(a, tmp_path / "one.xml"), to_openvino(tiny.fitted(), tmp_path / "two.xml")
    assert one.read_bytes() == two.read_bytes() and one.with_suffix(".bin").read_bytes() == two.with_suffix(".bin").read_bytes()
    assert str(tmp_path).encode() not in one.read_bytes()


WITHOUT_TORCH = """
import json, os, socket, sys
sys.modules["torch"] = None
def refuse(*a, **k): raise AssertionError("nothing is sent")
socket.socket.connect = refuse
import numpy as np
from anomnb.export.inferencer import Inferencer
path, images, out = sys.argv[1:]
images = list(np.load(images)) + [np.full((8, 8, 3), np.nan), np.zeros((50, 70, 3), np.uint8)]
found = Inferencer(path, threads=1).predict(images, batch_size=2, quiet=True)
np.savez(out, *[p.map if p.error is None else np.zeros(1) for p in found])
fields = "index source size score is_anomalous threshold map_threshold normalised kind category model_hash error".split()
print(json.dumps([{**{k: getattr(p, k) for k in fields}, "regions": len(p.regions)} for p in found]))
assert sys.modules["torch"] is None and not [m for m in sys.modules if m.startswith(("torch.", "timm", "lightning", "openvino_telemetry"))]
assert not os.path.exists(os.path.expanduser("~/intel"))
"""


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_same_predictions_without_torch(road, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "images.npy", np.stack(IMAGES))
    args = [str(road[2][kind][0]), str(tmp_path / "images.npy"), str(tmp_path / "maps.npz")]
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *args], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    theirs, maps = json.loads(ran.stdout), np.load(args[2])
    images = [*IMAGES, np.full((8, 8, 3), np.nan), np.zeros((50, 70, 3), np.uint8)]
    ours = Inferencer(road[2]["torch"][0]).predict(images, quiet=True)
    span = np.ptp(np.concatenate([p.raw_map.ravel() for p in ours.ok]))
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert (p.source, p.error, p.model_hash, p.is_anomalous, p.threshold, p.map_threshold) == \
            tuple(q[k] for k in ("source", "error", "model_hash", "is_anomalous", "threshold", "map_threshold"))
        if p.error is None:
            assert p.size == tuple(q["size"]) and len(p.regions) == q["regions"]
            assert abs(p.score - q["score"]) < 1e-5 * span and abs(p.map - maps[f"arr_{i}"]).max() < 1e-5 * span
    assert [p.index for p in ours.errors] == [3] and ours[2].is_anomalous


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_one_interface(road, kind, tmp_path):
    from PIL import Image
    for n, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_text("no image")
    look = Inferencer(road[2][kind][0], threads=1)
    listed = look.predict(tmp_path, batch_size=3, quiet=True)
    streamed = list(look.predict(tmp_path, stream=True, keep_maps=False))
    assert [p.source for p in listed] == [p.source for p in streamed] == [str(tmp_path / f"{n}.png") for n in range(4)]
    assert "3.png" in listed[3].error and all(p.raw_map is None for p in streamed)
    assert np.allclose([p.score for p in listed.ok], [p.score for p in streamed if p.error is None], rtol=1e-5)
    assert (listed[2].image() == IMAGES[2]).all()
    look.set_threshold(1e9, "never")
    assert not look.predict(IMAGES[2])[0].is_anomalous and Inferencer(look.path).rules[""].threshold < 1e9
    for shape in ((1, 3, 1, 1), (2, 3, 5, 300)):
        assert np.isfinite(look.raw(np.zeros(shape, np.float32)).map).all()
    assert "part" in repr(look)


def test_wrong_use(road):
    onnx = road[2]["onnx"][0]
    wrong = [
        (lambda: Inferencer(onnx, precision="fp32"), "did you mean 'f32'"),
        (lambda: Inferencer(onnx, precision="bf16"), "for OpenVINO"),
        (lambda: Inferencer(onnx, threads=0), "at least 1"),
        (lambda: Inferencer(onnx.with_suffix(".bin")), "did you mean .*part.xml"),
        (lambda: Inferencer(onnx.parent), "did you mean"),
        (lambda: Inferencer("a.pt"), "no exported model"),
        (lambda: Inferencer(onnx).predict(IMAGES[0], batch_size=0), "batch_size=0"),
        (lambda: Inferencer(onnx).raw(IMAGES[0]), "N×3×H×W"),
        (lambda: Inferencer(onnx).set_threshold(float("nan")), "finite"),
        (lambda: export_model(road[0], "a", "onnyx"), "did you mean 'onnx'"),
        (lambda: to_openvino(road[0], "a.onnx"), "ends in .xml"),
        (lambda: to_onnx(Patchcore("golden_pyramid"), "a.onnx"), "not fitted"),
    ]
    for call, words in wrong:
        with pytest.raises(AnomnbError, match=words):
            call()


def test_missing_files(road, tmp_path):
    for name in ("prat.onnx", "prat.xml", "prat.safetensors"):
        with pytest.raises(AnomnbFileError, match="did you mean '.*part"):
            Inferencer(road[1] / name)
    alone = tmp_path / "part.xml"
    alone.write_bytes(road[2]["openvino"][0].read_bytes())
    with pytest.raises(AnomnbFileError, match="part.bin' are missing"):
        Inferencer(alone)


def test_a_file_without_our_header(road, tmp_path):
    import onnx
    bare = onnx.load(road[2]["onnx"][0])
    del bare.metadata_props[:]
    (tmp_path / "bare.onnx").write_bytes(bare.SerializeToString())
    (tmp_path / "bare.xml").write_text("<net></net>")
    for name in ("bare.onnx", "bare.xml"):
        with pytest.raises(AnomnbError, match="no header of anomnb's"):
            Inferencer(tmp_path / name)


def test_an_altered_byte_is_found(tmp_path):
    onnx = to_onnx(tiny.fitted(), tmp_path / "a.onnx")
    xml = to_openvino(onnx, tmp_path / "a.xml")
    for path in (onnx, xml, xml.with_suffix(".bin")):
        data = path.read_bytes()
        for at in [*range(0, len(data), len(data) // 60), *range(len(data) - 20, len(data))]:
            changed = bytearray(data)
            changed[at] ^= 1
            path.write_bytes(changed)
            with pytest.raises(AnomnbError):
                Inferencer(xml if path.suffix == ".bin" else path)
        for keep in (0, 10, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:keep])
            with pytest.raises(AnomnbError):
                Inferencer(xml if path.suffix == ".bin" else path)
        path.write_bytes(data)
    header = json.loads(json.dumps(Inferencer(onnx).header))
    moved = onnx.read_bytes().replace(b'"method":"conformal"', b'"method":"conformat"')
    onnx.write_bytes(moved)
    with pytest.raises(AnomnbError, match="damaged"):
        Inferencer(onnx)
    newer = xml.read_bytes().replace(b"&quot;format&quot;:1", b"&quot;format&quot;:8")
    xml.write_bytes(newer)
    with pytest.raises(AnomnbError, match="newer version of anomnb"):
        Inferencer(xml)
    assert header["format"] == 1


def test_the_bin_of_another_export(tmp_path):
    a, b = tiny.fitted(), tiny.fitted(images=6)
    for name, model in (("a", a), ("b", b)):
        to_openvino(model, tmp_path / f"{name}.xml")
    (tmp_path / "a.bin").write_bytes((tmp_path / "b.bin").read_bytes())
    with pytest.raises(AnomnbError, match="not the pair that was exported together"):
        Inferencer(tmp_path / "a.xml")


class Level(AnomalyModule):
    "An image-level detector, with a switch that spoils what is exported"
    def __init__(self, spoil=0.0): super().__init__()  # noqa: E704

    def make_net(self, load_weights):
        from anomnb.processing.pre import Pre
        self.pre, self.net = Pre(32), Mean(self.args["spoil"])


class Mean(torch.nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def forward(self, x):
        from anomnb.core.types import Raw
        return Raw(x.mean((1, 2, 3)) + (self.spoil if torch.compiler.is_exporting() else 0))


@pytest.fixture()
def level():
    register_model("level", Level)
    yield lambda **kw: setattr(m := Level(**kw).build(), "fitted", True) or m
    del MODELS["level"]


def test_a_model_without_a_map(level, tmp_path):
    for kind in ("torch", "onnx", "openvino"):
        path, parity = export_model(level(), tmp_path / "level", kind, images=IMAGES)
        assert parity.ok and all(r["map"] is None for r in parity.rows) and "–" in str(parity)
        found = Inferencer(path).predict(IMAGES, quiet=True)
        assert found[0].map is None and found[0].is_anomalous is None and found[0].regions == []


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_what_disagrees_is_not_kept(level, tmp_path, kind):
    before = export_model(level(), tmp_path / "level", kind, images=IMAGES)[0].read_bytes()
    with pytest.raises(AnomnbError, match="(?s)not kept.*DISAGREES.*decisions.*96×96"):
        export_model(level(spoil=0.3), tmp_path / "level", kind, images=IMAGES)
    assert (tmp_path / "level").with_suffix(".xml" if kind == "openvino" else ".onnx").read_bytes() == before
    path, parity = export_model(level(spoil=0.3), tmp_path / "unseen", kind, verify=False)
    assert parity is None and Inferencer(path).header["verified_on"] == ""


def test_decisions_that_differ_are_counted(level, tmp_path):
    model = level()
    path = export_model(model, tmp_path / "level", "onnx", images=IMAGES)[0]
    scores = Inferencer(path).raw(np.stack([to_unit(o) for o in IMAGES])).score
    model.rules = {"": conformal_rule([float(np.sort(scores)[1]) - 0.5 * np.ptp(scores[:2]) - 1e-3], strict=False)}
    parity = verify(model, path, IMAGES)
    assert not parity.ok and parity.worst < 1e-5 and sum(r["decisions"] for r in parity.rows) > 0


def test_verify_on_a_single_small_image(level, tmp_path):
    path, parity = export_model(level(), tmp_path / "level", "onnx", images=np.full((5, 9, 3), 80, np.uint8))
    assert parity.ok and parity.rows[0]["size"] == (5, 9)
