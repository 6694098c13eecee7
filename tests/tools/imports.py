"""Which room imports which: `python tests/tools/imports.py` prints every import that goes down, or that no requirement answers for."""
import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from project import LIB, ROOMS, ROOT, modules

# what a requirement brings under another name than its own
PACKAGES = {"pillow": ["PIL"], "ipywidgets": ["ipywidgets", "IPython"], "timm": ["timm", "huggingface_hub"]}


def requirements() -> set:
    "Top-level packages that `pip install .` promises"
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    names = [re.split(r"[<>=!~\[]", o)[0] for o in ini["DEFAULT"]["requirements"].split()]
    return {p for n in names for p in PACKAGES.get(n, [n])}


def imported(module: Path) -> list:
    "Every absolute module name that a file imports, at any depth, with its line"
    package, found = ["anomnb", *module.relative_to(LIB).parent.parts], []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found += [(f"{name}.{a.name}" if name == "anomnb" else name, node.lineno) for a in node.names]
    return found


def late_places(module: Path) -> list:
    "The places that a file reaches through `late`"
    return [node.args[0].value for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "late"
            and node.args and isinstance(node.args[0], ast.Constant)]


def exists(place: str) -> bool:
    "Whether `module:name` is defined, read from the source"
    module, _, name = place.partition(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8")).body
    return any(name == getattr(n, "name", None) or name in [getattr(t, "id", None) for t in getattr(n, "targets", [])] for n in tree)


def problems() -> list:
    found, known = [], requirements()
    for module in modules():
        room, here = module.relative_to(LIB).parts[0], module.relative_to(ROOT)
        for name, line in imported(module):
            top, _, rest = name.partition(".")
            if top == "anomnb" and (below := rest.split(".")[0]) in ROOMS and ROOMS.index(below) > ROOMS.index(room):
                found.append(f"{here}:{line} {room} imports {name}, a room below it: reach down with late(\"…\")")
            if top != "anomnb" and top not in sys.stdlib_module_names and top not in known:
                found.append(f"{here}:{line} imports {top}, which is not among the requirements of settings.ini")
        found += [f"{here} reaches {place} by late, where nothing of that name is" for place in late_places(module)
                  if place.startswith("anomnb.") and not exists(place)]
    return found


if __name__ == "__main__":
    print(*problems() or ["every import goes up"], sep="\n")
    sys.exit(bool(problems()))
