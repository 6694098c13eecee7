"""What every stored page must be: `python tests/tools/notebooks.py` prints what is not so."""
import ast
import base64
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb
from project import LIB, NBS, ROOMS, code_cells, directives, module_name, modules, page_name, pages, source, text

MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:work|tmp|root|home|opt|var|mnt|private|Users)/\w")
INLINE_DATA = re.compile(r"data:[\w/+.-]*;base64,[A-Za-z0-9+/=\s]+")
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURE_LIMIT = 300_000  # bytes of one stored picture


def pairing() -> list:
    "A page of a room writes the module of its own name, and every module has its page"
    written, problems = set(), []
    for page in pages():
        room = page.relative_to(NBS).parts[0]
        exported = [v[0] for c in read_nb(page).cells for k, v in directives(c).items() if k == "default_exp"]
        expected = [module_name(page)] if room in ROOMS else []
        if exported != expected:
            problems.append(f"{page_name(page)} has default_exp {exported}, its place asks for {expected}")
        written.update(exported)
        for name in exported:
            if not LIB.joinpath(*name.split(".")).with_suffix(".py").exists():
                problems.append(f"{page_name(page)} has not been exported: run nbdev_export")
    for module in modules():
        name = ".".join(module.relative_to(LIB).with_suffix("").parts)
        if name not in written:
            problems.append(f"anomnb.{name} has no page: delete it, or give it its notebook")
    return problems


def format_problems(page: Path) -> list:
    "Cells keep their ids, or every module churns; no state of a kernel is stored"
    nb, ids = read_nb(page), [c.get("id") for c in read_nb(page).cells]
    problems = [] if (nb.nbformat, nb.nbformat_minor) == (4, 5) else [f"nbformat {nb.nbformat}.{nb.nbformat_minor}, not 4.5"]
    if None in ids or len(set(ids)) < len(ids):
        problems.append("cells without an id, or two with the same")
    problems += [f"cell {c.id} stores execution_count {c.execution_count}" for c in code_cells(nb) if c.get("execution_count")]
    return problems


def output_problems(page: Path) -> list:
    "Stored outputs are what a reader sees: no errors, logs, machine's paths or dead widgets, and small pictures"
    nb, problems = read_nb(page), []
    for cell in code_cells(nb):
        outputs, at = cell.get("outputs", []), f"cell {cell.id}"
        for output in outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                problems.append(f"{at} stores the error {output.get('ename')}: {output.get('evalue')}")
            if output.get("name") == "stderr":
                problems.append(f"{at} stores a log: {text(output.text)[:100]!r}")
            for words in [text(output.get("text", "")), *(text(v) for k, v in data.items() if k.startswith(("text/", "image/svg")))]:
                if found := MACHINE_PATH.search(INLINE_DATA.sub("", words)):
                    problems.append(f"{at} shows a path of one machine: {words[found.start():][:60]!r}")
            for kind in ("image/png", "image/jpeg"):
                if kind in data and (size := len(base64.b64decode(text(data[kind])))) > PICTURE_LIMIT:
                    problems.append(f"{at} stores a picture of {size:,} bytes, more than {PICTURE_LIMIT:,}")
        shown = {kind for o in outputs for kind in o.get("data", {})}
        if WIDGET in shown and not {"image/png", "image/jpeg", "text/html"} & shown:
            problems.append(f"{at} ends in a widget, which shows nothing without a kernel: show a picture of its states")
    if len(lesson_cells(nb)) > 1 and not any(c.get("outputs") for c in lesson_cells(nb)):
        problems.append("has lessons and no outputs: run tests/tools/execute.py on it")
    return problems


def lesson_cells(nb) -> list:
    "Code that a reader sees and that is neither library nor a bare import or check"
    quiet, shows = {"export", "exports", "hide", "default_exp", "eval:"}, re.compile(r"^(?!import |from |assert |test_|#)\S", re.M)
    return [c for c in code_cells(nb) if not quiet & set(directives(c)) and shows.search(source(c))]


def public_names(module: Path) -> list:
    "`__all__` as nbdev wrote it"
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def name_clashes() -> list:
    "No public name is that of a room, or of a module of its own room: importing the module would replace the function in the room"
    rooms = {room: {p.stem for p in modules() if p.parent.name == room} for room in ROOMS}
    return [f"anomnb.{p.parent.name}.{p.stem} exports {name!r}, which is also a module or a room"
            for p in modules() for name in public_names(p) if name in rooms[p.parent.name] or name in ROOMS]


def problems() -> list:
    found = pairing() + name_clashes()
    for page in pages():
        found += [f"{page_name(page)}: {o}" for o in format_problems(page) + output_problems(page)]
    return found


if __name__ == "__main__":
    print(*problems() or ["stored pages are in order"], sep="\n")
    sys.exit(bool(problems()))
