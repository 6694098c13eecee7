"""One rule for imports: a room may import any room above it, never one below; and some modules never need torch."""
import subprocess
import sys

import imports
import pytest
from project import LIB

HEAVY = ["torch", "torchvision", "lightning", "timm", "torchmetrics"]
WITHOUT_TORCH = [f"anomnb.core.{p.stem}" for p in sorted((LIB / "core").glob("[!_]*.py"))] + [
    "anomnb.data.read", "anomnb.processing.decision", "anomnb.export.inferencer"]


def test_imports_go_up():
    assert not imports.problems(), "\n" + "\n".join(imports.problems())


def test_the_check_sees_what_it_should(tmp_path, monkeypatch):
    room = tmp_path / "anomnb" / "data"
    room.mkdir(parents=True)
    (room / "bad.py").write_text("def f():\n    from ..engine.engine import Engine\n    import nbdev\nlate('anomnb.cli.none:nothing')\n")
    monkeypatch.setattr(imports, "LIB", tmp_path / "anomnb")
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    monkeypatch.setattr(imports, "requirements", lambda: set())
    monkeypatch.setattr(imports, "modules", lambda: [room / "bad.py"])
    down, undeclared, nowhere = imports.problems()
    assert "data imports anomnb.engine.engine" in down and "nbdev" in undeclared and "anomnb.cli.none:nothing" in nowhere


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module):
    code = f"import sys\nfor n in {HEAVY}: sys.modules[n] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
