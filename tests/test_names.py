"""The table of names is true, and nothing heavy is imported before it is used."""
import importlib
import subprocess
import sys

import names
import pytest
from project import LIB, ROOMS, modules

from anomnb.core.errors import AnomnbError
from anomnb.core.names import MODELS, NAMES, create_model, list_models, model_arguments

PLACES = [(room, name, place) for room, table in NAMES.items() for name, place in table.items()]


def test_the_rooms_are_the_table():
    assert list(NAMES) == ROOMS and all((LIB / room / "__init__.py").exists() for room in ROOMS)


@pytest.mark.parametrize("room, name, place", PLACES, ids=[f"{r}.{n}" for r, n, _ in PLACES])
def test_a_name_is_what_its_place_defines(room, name, place):
    module, _, attr = place.partition(":")
    value = getattr(importlib.import_module(module), attr)
    assert module.startswith(f"anomnb.{room}.") and value.__module__ == module
    assert getattr(importlib.import_module(f"anomnb.{room}"), name) is value


def test_a_name_stays_when_its_module_was_imported_first():
    "A submodule of the same name would take the function's place"
    lines = [f"import {'.'.join(('anomnb', *m.relative_to(LIB).with_suffix('').parts))}" for m in modules()]
    lines += ["import sys", "from types import ModuleType", "from anomnb.core.names import NAMES",
              "found = {f'{r}.{n}': getattr(sys.modules[f'anomnb.{r}'], n) for r, table in NAMES.items() for n in table}",
              "assert not (bad := [n for n, value in found.items() if isinstance(value, ModuleType)]), bad"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_made_by_its_name(name):
    assert MODELS[name]["family"] and set(MODELS[name]["tiny"]) <= set(model_arguments(name))
    model = create_model(name, **MODELS[name]["tiny"])
    assert model.registry_name == name and name in list_models(name[:2] + "*")


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'Folder'"):
        importlib.import_module("anomnb.data").Foldr
    with pytest.raises(ImportError):
        exec("from anomnb.models import Patchcor")
    with pytest.raises(AnomnbError, match="did you mean 'patchcore'"):
        create_model("patchcor")


@pytest.mark.parametrize("module", ["anomnb", *(f"anomnb.{room}" for room in ROOMS)])
def test_a_room_is_light_to_import(module):
    code = f"import sys, {module}\nassert not {{'torch', 'numpy', 'matplotlib.pyplot', 'openvino'}} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_the_rooms_repeat_their_names_for_editors():
    assert not names.problems(), "\n" + "\n".join(names.problems())


def test_editors_are_told_that_types_are_here():
    assert (LIB / "py.typed").exists()
