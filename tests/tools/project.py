"""Where things are: the rooms in their order, the pages and the modules they export."""
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS, LIB = ROOT / "nbs", ROOT / "anomnb"
ROOMS = ["core", "metrics", "data", "processing", "models", "visualizers", "export", "engine", "cli"]
SOURCES = ["nbs", "anomnb", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "_quarto.yml"]


def pages(root: Path = ROOT) -> list:
    "Every notebook of the site, in reading order of its folder"
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not any(o.startswith((".", "_")) for o in p.relative_to(root).parts))


def modules(root: Path = ROOT) -> list:
    "Every module that a notebook must have written"
    return sorted(p for p in (root / "anomnb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def page_name(page: Path) -> str:
    "`core/00_errors` for nbs/core/00_errors.ipynb"
    parts = page.parts[len(page.parts) - page.parts[::-1].index("nbs"):]
    return "/".join(parts).removesuffix(".ipynb")


def module_name(page: Path) -> str:
    "The module a page of a room must export: `core.errors` for nbs/core/00_errors.ipynb"
    return re.sub(r"(^|/)\d+[a-z]?_", r"\1", page_name(page)).replace("/", ".")


def source(cell) -> str:
    return "".join(cell.source)


def text(value) -> str:
    "A notebook's text, which is a string or a list of lines"
    return value if isinstance(value, str) else "".join(value)


def directives(cell) -> dict:
    "The `#|` words that head a code cell: {'export': [], 'default_exp': ['core.errors'], 'eval:': ['false']}"
    found = {}
    for line in source(cell).splitlines() if cell.cell_type == "code" else ():
        if line.strip() and not line.lstrip().startswith("#|"):
            break
        word, *rest = line.replace("#|", "", 1).split() or [""]
        if word:
            found[word] = rest
    return found


def code_cells(nb) -> list:
    return [c for c in nb.cells if c.cell_type == "code" and source(c).strip()]


def copy_sources(folder: Path) -> Path:
    "A copy of what is built from, so that a check never touches the checkout"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder
