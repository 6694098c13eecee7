"Backbones: nothing fetched at construction, weights from every source, bad input named, frozen, exported"
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from anomnb.core.errors import AnomnbError, AnomnbFileError
from anomnb.core.paths import shared_weights
from anomnb.models import backbones, weights
from anomnb.models.backbones import BACKBONES, Backbone, list_backbones, register_backbone
from anomnb.models.weights import lite0_weights, published_weights, read_weights

X = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))


def built(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Backbone(*args, weights="random", **kwargs).build()


@pytest.fixture
def no_net(monkeypatch, tmp_path):
    "No connection, no cache; a list of the attempts"
    tried = []
    def refuse(*args, **kwargs): tried.append(args); raise OSError("unreachable")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(weights.huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path/"hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tried


# Construction

def test_construction_fetches_and_moves_nothing(no_net):
    before = torch.get_rng_state()
    for name in ("wide_resnet50_2", "resnet18.a1_in1k", "tf_efficientnet_lite0", "convnext_tiny"):
        b = Backbone(name)
        assert b.net is None and not list(b.parameters()) and b.strides == [8, 16]
    assert not no_net and torch.equal(before, torch.get_rng_state())


def test_levels_are_what_the_network_gives():
    for name in ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_100", "swin_tiny_patch4_window7_224", "convnext_atto"):
        b = built(name)
        maps = b(torch.zeros(1, 3, 224, 224))
        assert [tuple(o.shape) for o in maps] == [(1, c, 224//s, 224//s) for c, s in zip(b.channels, b.strides)], name


def test_layers_by_name_position_and_stride():
    want = Backbone("resnet18").config()
    for layers in (["layer2", "layer3"], ("layer3", "layer2"), [2, 3], ["layer2", 3], [2, 2, 3]):
        assert Backbone("resnet18", layers=layers).config() == want
    assert Backbone("resnet18", layers="layer1").layers == Backbone("resnet18", layers=1).layers == ["layer1"]
    assert Backbone("resnet18", strides=(4, 8, 16)).layers == ["layer1", "layer2", "layer3"]
    lite = Backbone("tf_efficientnet_lite0", strides=(4, 8, 16))
    assert (lite.layers, lite.channels) == (["blocks.1", "blocks.2", "blocks.4"], [24, 40, 112])
    assert lite.mean == lite.std == (0.5, 0.5, 0.5) and Backbone("resnet18").mean == (0.485, 0.456, 0.406)
    assert json.loads(json.dumps(lite.config()))["source"] == "tf_efficientnet_lite0"


@pytest.mark.parametrize("args,words", [
    (dict(source="resnet_18x"), "unknown backbone 'resnet_18x': did you mean 'resnet18'"),
    (dict(source="tf-efficientnet-lite0"), "'tf_efficientnet_lite0'"),
    (dict(source="resnet18.a1_in1"), "unknown weights tag of resnet18 'a1_in1': did you mean 'a1_in1k'"),
    (dict(source="resnet18", layers=["layer_3"]), "unknown layer 'layer_3': did you mean 'layer3'"),
    (dict(source="resnet18", layers=[9]), "no layer 9: give 0 to 4, or one of act1, layer1"),
    (dict(source="resnet18", layers=[-1]), "no layer -1"),
    (dict(source="resnet18", layers=[]), "choose layers= among"),
    (dict(source="vit_small_patch14_dinov2"), "no layer of stride 8 or 16: choose layers= among blocks.0 (14)"),
    (dict(source=3), "a name or an nn.Module, not int"),
    (dict(source="resnet18", weights=3), "not int"),
    (dict(source=nn.Identity(), weights="random"), "load them into the module"),
])
def test_bad_arguments(args, words):
    with pytest.raises(AnomnbError) as e: Backbone(**args)
    assert words in str(e.value)


# The network

def test_frozen_and_shallow():
    b = built("resnet18").train()
    assert not any(m.training for m in b.modules()) and not any(p.requires_grad for p in b.parameters())
    assert not any("layer4" in k or "fc" in k for k in b.state_dict()) and "net.layer3.1.bn2.weight" in b.state_dict()
    assert all(not o.requires_grad for o in b(X.clone().requires_grad_()))
    before = {k: v.clone() for k, v in b.state_dict().items()}
    b(X)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    lite = built("tf_efficientnet_lite0", layers="blocks.2")
    assert len(lite.net.blocks) == 3


def test_random_is_seeded_and_warns():
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="random weights"): a = Backbone("resnet18", weights="random").build()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert all(torch.equal(p, q) for p, q in zip(a(X), built("resnet18")(X)))


def test_architecture_alone_takes_saved_tensors(no_net, tmp_path):
    a = built("resnet18")
    for source in (None, "random", str(tmp_path/"gone.pth")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            b = Backbone("resnet18", weights=source).build(load_weights=False)
        b.load_state_dict({k: v*1.5 for k, v in a.state_dict().items()})
        assert b.build() is b and torch.equal(b.state_dict()["net.conv1.weight"], a.state_dict()["net.conv1.weight"]*1.5)
    assert not no_net


def test_forward_before_build():
    with pytest.raises(AnomnbError, match="call build"): Backbone("resnet18")(X)


# Weights

def test_lite0_is_the_whole_network_of_timm(no_net):
    state = lite0_weights()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(state) # strict: all 296
    assert len(state) == 296
    b = Backbone("tf_efficientnet_lite0", strides=(4, 8, 16)).build()
    net = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
    net.load_state_dict(state, strict=False)
    with torch.no_grad():
        for p, q in zip(b(X), net(X)): torch.testing.assert_close(p, q)
        assert whole(X).std() > 0.1
    assert not no_net


def test_lite0_altered_or_absent(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(weights, "LITE0_SHA256", "0"*64)
        with pytest.raises(AnomnbError, match="SHA-256 differs"): Backbone("tf_efficientnet_lite0").build()
    def gone(name): raise ModuleNotFoundError(name)
    monkeypatch.setattr(weights, "files", gone)
    with pytest.raises(AnomnbFileError, match="pip install efficientnet_lite0"): Backbone("tf_efficientnet_lite0").build()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "regnety_002"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_file_of_the_whole_classifier(name, suffix, tmp_path):
    torch.manual_seed(3)
    whole = timm.create_model(name).eval()
    path = tmp_path/f"w.{suffix}"
    if suffix == "pth": torch.save({"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, path)
    else: save_file({k: v.contiguous() for k, v in whole.state_dict().items()}, path)
    b = Backbone(name, weights=path).build()
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 3, 224, 224)).astype(np.float32))
    with torch.no_grad(): want = whole.forward_intermediates(x, indices=b.kind.indices, intermediates_only=True)
    if name in ("resnet18", "convnext_atto", "vit_tiny_patch16_224"): # the same taps in both of timm's interfaces
        for p, q in zip(b(x), want): torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
    given = {weights._flat(k): v for k, v in whole.state_dict().items()}
    assert all(torch.equal(v, given[weights._flat(k.removeprefix("net."))]) for k, v in b.state_dict().items())
    assert b.config()["weights"] == path.name


@pytest.mark.skipif(shared_weights() is None, reason="no local resnet18 weights (ANOMNB_WEIGHTS)")
def test_resnet18_without_its_last_layer():
    b = Backbone("resnet18", strides=(4, 8, 16), weights=shared_weights()).build()
    given = read_weights(shared_weights())
    lost = {k for k in b.net.state_dict() if k not in given}
    assert lost and all(k.endswith("num_batches_tracked") for k in lost)
    assert all(torch.equal(v, b.net.state_dict()[k]) for k, v in given.items())
    with pytest.raises(AnomnbError, match=r"don't fit 'resnet18', lacking layer4.0.conv1.weight \(512, 256, 3, 3\)"):
        Backbone("resnet18", layers="layer4", weights=shared_weights()).build()
    with pytest.raises(AnomnbError, match="don't fit 'wide_resnet50_2'"): Backbone("wide_resnet50_2", weights=shared_weights()).build()


class Trap:
    def __reduce__(self): return print, ("code was run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_weights(tmp_path, capsys):
    (tmp_path/"trap.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": Trap()}, tmp_path/"trap2.pth")
    torch.save([1, 2], tmp_path/"list.pth")
    torch.save({"epoch": 3}, tmp_path/"none.pth")
    torch.save({}, tmp_path/"empty.pth")
    (tmp_path/"zero.pth").write_bytes(b"")
    (tmp_path/"text.safetensors").write_text("not weights at all")
    (tmp_path/"zero.safetensors").write_bytes(b"")
    save_file({"a": torch.zeros(1000)}, tmp_path/"cut.safetensors")
    (tmp_path/"cut.safetensors").write_bytes((tmp_path/"cut.safetensors").read_bytes()[:900])
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(AnomnbError, match="can't be read as weights") as e: Backbone("resnet18", weights=path).build()
        assert path.name in str(e.value)
    assert "code was run" not in capsys.readouterr().out
    for gone in ("no.safetensors", "no.pth", ""):
        with pytest.raises(AnomnbFileError, match="no file of weights") as e: Backbone("resnet18", weights=tmp_path/gone).build()
        assert isinstance(e.value, FileNotFoundError)


def test_wrong_shapes_are_shown(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(32, 3, 7, 7)
    torch.save(state, tmp_path/"w.pth")
    with pytest.raises(AnomnbError) as e: Backbone("resnet18", weights=tmp_path/"w.pth").build()
    assert "having conv1.weight (32, 3, 7, 7) where conv1.weight (64, 3, 7, 7) is wanted" in str(e.value)


# From afar

def says_the_ways_out(call):
    start = time.perf_counter()
    with pytest.raises(AnomnbError) as e: call()
    assert time.perf_counter() - start < 1
    for way in ("weights='a/file.safetensors'", "weights='random'", "backbone='tf_efficientnet_lite0'"): assert way in str(e.value)
    return str(e.value)


def test_no_network_and_no_weights(no_net, monkeypatch):
    b = Backbone("wide_resnet50_2")
    assert "huggingface.co can't be reached" in says_the_ways_out(b.build)
    assert no_net and b.net is None
    no_net.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    says_the_ways_out(b.build)
    assert not no_net
    assert "no published weights" in says_the_ways_out(Backbone("cspresnet50d").build)
    assert "github" in says_the_ways_out(Backbone("gcvit_base").build)


@pytest.mark.parametrize("where", ["getaddrinfo", "create_connection"])
def test_a_network_that_hangs(no_net, monkeypatch, where):
    def hang(*a, **k): time.sleep(3); raise OSError("timed out")
    monkeypatch.setattr(socket, where, hang)
    says_the_ways_out(lambda: published_weights("resnet18"))


def test_a_proxy_is_asked_instead(no_net, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    monkeypatch.setattr(weights, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(socket, "create_connection", lambda at, t: asked.append(at) or SimpleNamespace(close=lambda: None))
    assert weights._answers("https://huggingface.co") and asked == [("proxy.example", 3128)]


def test_a_download_says_its_source_and_size(no_net, monkeypatch, tmp_path, capsys):
    torch.manual_seed(1)
    whole = timm.create_model("resnet18")
    save_file(whole.state_dict(), tmp_path/"model.safetensors")
    hub = weights.huggingface_hub
    monkeypatch.setattr(weights, "_answers", lambda url: True)
    monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision=None: ["README.md", "model.safetensors"])
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url: SimpleNamespace(size=46_800_000))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, revision=None: str(tmp_path/name))
    b = Backbone("resnet18").build()
    assert "downloading model.safetensors of timm/resnet18.a1_in1k from https://huggingface.co, 47 MB" in capsys.readouterr().out
    assert torch.equal(b.net.state_dict()["conv1.weight"], whole.state_dict()["conv1.weight"])
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name, revision=None: str(tmp_path/name))
    monkeypatch.setattr(weights, "_answers", lambda url: pytest.fail("the cache is enough"))
    Backbone("resnet18").build()
    assert not capsys.readouterr().out


def test_a_download_that_breaks(no_net, monkeypatch):
    monkeypatch.setattr(weights, "_answers", lambda url: True)
    def broken(*a, **k): raise ConnectionResetError("reset by the other side")
    monkeypatch.setattr(weights.huggingface_hub, "list_repo_files", broken)
    assert "download of the weights of 'resnet18' failed (ConnectionResetError: reset" in says_the_ways_out(Backbone("resnet18").build)


def test_offline_in_a_process_of_its_own():
    code = ("import time; from anomnb.models.backbones import Backbone; b = Backbone('wide_resnet50_2'); t = time.perf_counter()\n"
            "try: b.build()\nexcept ValueError as e: print(time.perf_counter() - t < 1, 'weights=' in str(e))")
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME="/nowhere", TORCH_HOME="/nowhere")
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split() == ["True", "True"]


# Modules and names of one's own

class Two(nn.Module):
    def __init__(self, kind=list):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return {"a": a, "deep": b} if self.kind is dict else b if self.kind is None else self.kind([a, b])


@pytest.mark.parametrize("kind,names", [(list, ["0", "1"]), (tuple, ["0", "1"]), (dict, ["a", "deep"]), (None, ["0"])])
def test_modules(kind, names):
    net = Two(kind).train()
    b = Backbone(net)
    assert b.layers == names and b.strides == [4, 8][-len(names):] and b.channels == [4, 6][-len(names):]
    assert [o.shape[1] for o in b.build()(X)] == b.channels
    assert net.training and all(p.requires_grad for p in net.parameters()) # the caller's own is untouched
    assert b.config()["source"] is None and json.dumps(b.config())
    last = Backbone(net, layers=names[-1]).build()
    assert torch.equal(last(X)[0], b(X)[-1])
    again = Backbone(Two(kind)).build(load_weights=False)
    again.load_state_dict(b.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(again(X), b(X)))


def test_inner_layers_of_a_module():
    net = timm.create_model("resnet18").eval()
    b = Backbone(net, layers=["layer2", "layer3"])
    assert (b.channels, b.strides, b.mean) == ([128, 256], [8, 16], (0.485, 0.456, 0.406))
    b.build()
    assert not any("layer4" in k for k in b.state_dict())
    with torch.no_grad(): want = net.forward_intermediates(X, indices=[2, 3], intermediates_only=True)
    for p, q in zip(b(X), want): torch.testing.assert_close(p, q)
    with pytest.raises(AnomnbError, match="unknown layer 'layer22': did you mean 'layer2'"): Backbone(net, layers=["layer22"])
    with pytest.raises(AnomnbError, match=r"returns \(1, 1000\) and not maps .*: give layers="): Backbone(net)
    with pytest.raises(AnomnbError, match="can't take images"): Backbone(nn.Linear(3, 3))


def test_registered(monkeypatch):
    monkeypatch.setattr(backbones, "BACKBONES", BACKBONES.copy())
    asked = []
    def factory(weights): asked.append(weights); return Two(dict)
    register_backbone("two_maps", factory, mean=(0, 0, 0), std=(1, 1, 1))
    b = Backbone("two_maps", layers=["deep"], weights="some/file")
    assert asked == ["random"] and b.mean == (0, 0, 0) and b.config()["source"] == "two_maps"
    a = b.build(load_weights=True)(X)
    assert asked == ["random", "some/file"] and torch.equal(a[0], Backbone("two_maps", "deep").build()(X)[0])
    known = list_backbones()
    assert known.index("two_maps") < known.index("tf_efficientnet_lite0") < known.index("resnet18") and list_backbones("two_*") == ["two_maps"]
    with pytest.raises(AnomnbError, match="did you mean 'two_maps'"): Backbone("two_map")
    for taken in ("two_maps", "resnet18"):
        with pytest.raises(AnomnbError, match="is taken"): register_backbone(taken, lambda w: Two())


# Export

@pytest.mark.parametrize("name", ["resnet18"]) # the export room takes tf_efficientnet_lite0 all the way
def test_onnx(name, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    b = built(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(b, (X,), dynamo=True, dynamic_shapes=({0: batch},), opset_version=18, verbose=False)
    program.save(str(tmp_path/"b.onnx"))
    session = ort.InferenceSession(str(tmp_path/"b.onnx"), providers=["CPUExecutionProvider"])
    x = torch.cat([X, X[:1]*0.5])
    for p, q in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), b(x)):
        assert np.abs(p - q.numpy()).max() <= 1e-4*float(q.max() - q.min())
