"""README.md from nbs/index.ipynb, without Quarto: `python tests/tools/readme.py` writes it.

Markdown cells are taken over with their links seen from the root, code becomes a Python block, text an indented one, and pictures go to
nbs/images/.
"""
import base64
import os
import re
from pathlib import Path

from execnb.nbio import read_nb
from project import NBS, ROOT, directives, source, text

INDEX = NBS / "index.ipynb"
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(?=[)\s])")
HIDDEN = {"hide", "default_exp", "export", "exporti"}


def from_root(words: str) -> str:
    "Relative links of a page in nbs/ as the root sees them; code blocks stay as they are"
    blocks = re.split(r"(^```.*?^```)", words, flags=re.M | re.S)
    blocks[::2] = [LINK.sub(lambda m: m[1] + os.path.normpath("nbs/" + m[2]), o) for o in blocks[::2]]
    return "".join(blocks)


def shown(output, name: str, alt: str, pictures: dict) -> str:
    "One stored output as Markdown; a picture is put into `pictures`"
    data = output.get("data", {})
    for kind, end in (("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            pictures[f"{name}.{end}"] = base64.b64decode(text(data[kind]))
            return f"![{alt}](nbs/images/{name}.{end})"
    if "text/markdown" in data:
        return from_root(text(data["text/markdown"]).strip())
    words = text(data.get("text/plain", output.get("text", ""))).rstrip("\n")
    return "\n".join(("    " + o).rstrip() for o in words.splitlines())


def readme() -> tuple:
    "The text of README.md, and the pictures of nbs/images/ that it shows"
    parts, pictures = ["<!-- Written by tests/tools/readme.py from nbs/index.ipynb: edit that. -->"], {}
    for cell in read_nb(INDEX).cells:
        words = directives(cell)
        if cell.cell_type == "markdown":
            parts.append(from_root(source(cell).strip()))
        elif cell.cell_type == "code" and not HIDDEN & set(words):
            code = "\n".join(o for o in source(cell).splitlines() if not o.lstrip().startswith("#|"))
            if words.get("echo:") != ["false"]:
                parts.append(f"```python\n{code.strip()}\n```")
            alt = " ".join(words.get("fig-alt:", [])).strip("\"'")
            parts += [shown(o, f"index_{cell.id}" + (f"_{n}" if n else ""), alt, pictures) for n, o in enumerate(cell.get("outputs", []))]
    return "\n\n".join(filter(None, parts)) + "\n", pictures


def outputs() -> dict:
    "Path and bytes of everything that is generated"
    words, pictures = readme()
    return {ROOT / "README.md": words.encode(), **{NBS / "images" / n: b for n, b in pictures.items()}}


def leftovers() -> list:
    "Pictures of an earlier front page"
    return sorted(p for p in (NBS / "images").glob("index_*") if p not in outputs())


def problems() -> list:
    found = [f"{p.relative_to(ROOT)} is not what nbs/index.ipynb says: run python tests/tools/readme.py" for p, b in outputs().items()
             if not p.exists() or p.read_bytes() != b]
    return found + [f"{p.relative_to(ROOT)} is shown nowhere: run python tests/tools/readme.py" for p in leftovers()]


def write() -> list:
    changed = [p for p, b in outputs().items() if not p.exists() or p.read_bytes() != b]
    for path in changed:
        path.parent.mkdir(exist_ok=True)
        Path(path).write_bytes(outputs()[path])
    for path in leftovers():
        path.unlink()
    return changed


if __name__ == "__main__":
    print("written:", *[p.relative_to(ROOT) for p in write()] or ["nothing"])
