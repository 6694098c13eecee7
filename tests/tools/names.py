"""Repeat the table of names in each room's `__init__` for editors: `python tests/tools/names.py` writes what has changed.

A room's names are lazy (PEP 562), so an editor or a type checker sees none of them; under `TYPE_CHECKING` it does, and nothing is imported.
"""
from project import LIB, ROOMS, ROOT

TEMPLATE = '''"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
{names}

__getattr__, __dir__, __all__ = lazy_names(__name__)
'''


def init_text(room: str) -> str:
    "A room's `__init__.py` as the table asks for it"
    from anomnb.core.names import NAMES
    places = sorted(p.split(":") for p in NAMES[room].values())
    return TEMPLATE.format(names="\n".join(f"    from {module} import {name} as {name}" for module, name in places))


def problems() -> list:
    return [f"anomnb/{room}/__init__.py does not repeat core.names.NAMES: run python tests/tools/names.py"
            for room in ROOMS if (LIB / room / "__init__.py").read_text(encoding="utf-8") != init_text(room)]


def write() -> list:
    "Rewrite the rooms that differ"
    changed = [room for room in ROOMS if (LIB / room / "__init__.py").read_text(encoding="utf-8") != init_text(room)]
    for room in changed:
        (LIB / room / "__init__.py").write_text(init_text(room), encoding="utf-8")
    return changed


if __name__ == "__main__":
    import sys
    sys.path.insert(0, str(ROOT))
    print("rewritten:", *write() or ["nothing"])
