"""What stands on the disk after a fault or a kill: the old file, the new one, or none; never a part of one."""
import builtins
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import tiny  # noqa: E402

from anomnb.core import files  # noqa: E402
from anomnb.core.errors import AnomnbError, AnomnbFileError  # noqa: E402
from anomnb.export.bundle import load, save  # noqa: E402
from anomnb.export.inferencer import Inferencer  # noqa: E402
from anomnb.export.parity import export_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
KINDS = dict(torch=".safetensors", onnx=".onnx", openvino=".xml")


class Fault:
    "Lets so many writes, syncs, renames and removals pass, then the disk is full or the writer is stopped"
    def __init__(self, monkeypatch, passes=10**9, error=OSError(28, "No space left on device")):
        self.passes, self.error, self.seen = passes, error, []
        monkeypatch.setattr(files, "open", self.open, raising=False)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(files.os, name, self.step(name, getattr(os, name)))

    def step(self, name, real):
        def call(*args):
            self.seen.append(name)
            if len(self.seen) > self.passes:
                raise self.error
            return real(*args)
        return call

    def open(self, *args):
        f = builtins.open(*args)
        real = f.write

        class Writer:
            def __enter__(s): return s  # noqa: E704
            def __exit__(s, *exc): f.close()  # noqa: E704
            def __getattr__(s, name): return getattr(f, name)  # noqa: E704

            def write(s, data):
                real(data[:len(data) // 2])
                return self.step("write", lambda d: real(d[len(d) // 2:]))(data)
        return Writer()


@pytest.fixture(scope="module")
def models():
    return tiny.fitted(), tiny.fitted(images=6)


def write(model, path, kind):
    return export_model(model, path, kind, verify=False)[0]


def whole(path):
    "The hash of the model that a whole file holds, or None where there is no file"
    return Inferencer(path).model_hash if path.exists() else None


ERRORS = dict(full=OSError(28, "No space left on device"), readonly=OSError(30, "Read-only file system"), ctrl_c=KeyboardInterrupt())


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_every_step(models, tmp_path, kind, error):
    old, new = models
    for kept in (True, False):  # over an older file, and where none was
        for passes in range(20):
            folder = tmp_path / f"{kept}-{passes}"
            path = folder / f"part{KINDS[kind]}"
            folder.mkdir()
            if kept:
                write(old, path, kind)
            with pytest.MonkeyPatch.context() as m:
                fault = Fault(m, passes, error)
                try:
                    write(new, path, kind)
                except (AnomnbError, KeyboardInterrupt) as e:
                    assert isinstance(e, KeyboardInterrupt) == isinstance(error, KeyboardInterrupt)
                else:
                    break
            files_each = 2 if kind == "openvino" else 1  # made in a scratch folder first, then moved: each file is written twice
            published = fault.seen.count("replace") == 2 * files_each and fault.seen[-1] != "replace"
            before = old.model_hash if kept else None
            gone = not published and kind == "openvino" and fault.seen.count("replace") >= files_each and len(fault.seen) > 4 * files_each
            assert whole(path) == (new.model_hash if published else None if gone else before)
            assert not [o.name for o in folder.iterdir() if o.suffix not in (".safetensors", ".onnx", ".xml", ".bin")]
            assert path.exists() or not list(folder.iterdir())
        assert passes == len(fault.seen) == 8 * files_each and whole(path) == new.model_hash


def test_the_error_names_the_file_and_the_cure(models, tmp_path, monkeypatch):
    Fault(monkeypatch, 0)
    with pytest.raises(AnomnbFileError, match="part.safetensors.*No space left.*Free space or choose another place"):
        save(models[0], tmp_path / "part.safetensors")


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import tiny
from anomnb.core import files
from anomnb.export.parity import export_model
model, (kind, path) = tiny.fitted(images=6), sys.argv[2:4]
made = export_model(model, path + "-first", kind, verify=False) # so that only the writing is left to do
for point in sys.argv[4].split(","):
    target = f"{path}-{point}"
    if os.fork() == 0:
        name, _, count = point.partition("@")
        seen = 0
        def stop(real):
            def call(*args):
                global seen
                seen += 1
                if seen >= int(count): os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return call
        if name == "write":
            def half(tmp, path, content, real=files._publish):
                def some(f):
                    f.write(content[:len(content)//2]); f.flush()
                    stop(lambda: f.write(content[len(content)//2:]))()
                return real(tmp, path, some)
            files._publish = half
        else: setattr(files.os, name, stop(getattr(os, name)))
        export_model(model, target, kind, verify=False)
        os._exit(0)
    print(point, os.waitstatus_to_exitcode(os.wait()[1]))
"""
# in the scratch folder first, with one write, two syncs (file and folder) and one rename a file, and then the same at the target
POINTS = dict(torch=["write@1", "write@2", "fsync@3", "replace@2", "fsync@4"], onnx=["write@2", "replace@2"],
              openvino=["write@1", "write@3", "replace@3", "fsync@6", "write@4", "replace@4", "fsync@8"])


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9(models, tmp_path, kind):
    old, new = models
    points = POINTS[kind]
    for point in points:
        write(old, tmp_path / f"part-{point}", kind)
    args = [sys.executable, "-c", KILLED, str(GOLDEN), kind, str(tmp_path / "part"), ",".join(points)]
    ran = subprocess.run(args, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [w for p in points for w in (p, str(-signal.SIGKILL))]
    for point in points:
        path = tmp_path / f"part-{point}{KINDS[kind]}"
        last = point == points[-1] and point.startswith("fsync")
        gone = kind == "openvino" and point != "write@1"
        assert whole(path) == (new.model_hash if last else None if gone else old.model_hash)
        assert whole(write(new, path, kind)) == new.model_hash  # what a kill leaves behind is in nobody's way
    if kind == "torch":
        assert load(path).model_hash == new.model_hash
