"""The site, checked without Quarto: `python tests/tools/website.py` processes the pages in a temporary copy and prints what is wrong.

Quarto renders what nbdev's processors hand over, so the check reads those pages: every sidebar target, link and anchor is there, every page
has a title and a subtitle, and nothing that was written is lost. `--write` puts nbs/sidebar.yml and nbs/nbdev.yml right. Nothing here asks
for Quarto or installs it (nbdev's own `nbdev_docs` and `nbdev_readme` would).
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from project import NBS, ROOMS, ROOT, copy_sources, page_name, pages, source, text

TITLES = {"cli": "Command line"}  # other sections are named as their room
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
TAG_LINK = re.compile(r"""<(?:a|img)\b[^>]*?\b(?:href|src)=["']([^"']+)""")
BUILD = """
import json, os, warnings
import nbdev.serve_drv
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

problems, process = [], nbdev.serve_drv.main
def careful(job):
    name = os.path.relpath(job[0], "nbs").removesuffix(".ipynb")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try: process(job)
        except Exception as e: problems.append(f"{name} cannot be processed for the site: {str(e)[:300]} ({e.__cause__!r})")
    for w in map(str, (o.message for o in seen)):
        if "other code" in w: problems.append(f"{name} mixes imports with other code in a cell, which breaks the site: {w[45:250]!r}")
nbdev.serve_drv.main = careful
refresh_quarto_yml()
proc_nbs(n_workers=0)
json.dump(problems, open("problems.json", "w"))
"""


def sidebar() -> dict:
    "Front page, tutorials, then the rooms from the top of the house down"
    contents = ["index.ipynb"]
    for room in ["tutorials", *ROOMS]:
        found = [p.relative_to(NBS).as_posix() for p in pages() if p.relative_to(NBS).parts[0] == room]
        contents += [{"section": TITLES.get(room, room.capitalize()), "contents": found}] if found else []
    return {"website": {"sidebar": {"contents": contents}}}


def sidebar_text() -> str:
    return "# Written by tests/tools/website.py --write\n" + yaml.dump(sidebar(), sort_keys=False)


def build(folder: Path) -> tuple:
    "A copy of the sources with nbdev's processed pages in `_proc`, and what the processors complained of"
    copy_sources(folder)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    for command in (["setup.py", "-q", "egg_info"], ["-c", BUILD]):  # the first makes nbdev link `symbols` of this package
        done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the site's pages cannot be processed:\n{done.stderr[-3000:]}")
    return folder / "_proc", json.loads((folder / "problems.json").read_text(encoding="utf-8"))



def slug(heading: str) -> str:
    "Pandoc's identifier of a heading"
    words = re.sub(r"<[^>]+>", "", unescape(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)))
    words = re.sub(r"[^\w\s.-]", "", re.sub(r"[`*]", "", words)).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words)) or "section"


def without_code(words: str) -> str:
    return re.sub(r"`[^`\n]*`", "`", re.sub(r"^```.*?^```", "", words, flags=re.M | re.S))


def markdown(nb) -> list:
    "Everything in a page that is rendered as Markdown"
    return [source(c) for c in nb.cells if c.cell_type == "markdown"] + [
        text(o.data["text/markdown"]) for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]


def anchors(nb) -> set:
    "Identifiers that a link to the page may name"
    found = {}
    for words in markdown(nb):
        for heading in re.findall(r"^#+\s+(.+?)\s*#*$", re.sub(r"^```.*?^```", "", words, flags=re.M | re.S), re.M):
            own = re.search(r"\{[^}]*#([\w.-]+)[^}]*\}$", heading)
            name = own[1] if own else slug(heading)
            found[name] = found.get(name, -1) + 1
    return {f"{n}-{k}" if k else n for n, times in found.items() for k in range(times + 1)} | set(
        re.findall(r"""\bid=["']([\w.-]+)""", "\n".join(markdown(nb))))


def links(nb) -> list:
    "Relative links that the page's author wrote"
    words = [without_code(o) for o in markdown(nb)]
    return [o for w in words for o in LINK.findall(w) + TAG_LINK.findall(w) if not re.match(r"[a-z]+:|//", o)]


def output_file(page: Path) -> str:
    "The name under which Quarto publishes a page: 00_errors.ipynb becomes errors.html"
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", page.name.lower()).removesuffix(".ipynb") + ".html"


def link_problems(page: Path, proc: Path) -> list:
    "Links of one page that lead nowhere"
    found, published = [], {(p.parent / output_file(p)).resolve(): p for p in pages()}
    for link in links(read_nb(page)):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        path = published.get(path, path)
        if not path.is_relative_to(NBS) or not path.exists():
            found.append(f"links to {link}, which is not on the site")
        elif anchor and (proc / path.relative_to(NBS)).exists() and anchor not in anchors(read_nb(proc / path.relative_to(NBS))):
            found.append(f"links to {link}: the page has no such heading")
    return found


def symbol_problems(page: Path, proc: Path) -> list:
    "Links that nbdev made from `symbols` of this package, where no page is published"
    ini = (ROOT / "settings.ini").read_text(encoding="utf-8")
    base = "".join(re.search(rf"^{key} = (.*)$", ini, re.M)[1] for key in ("doc_host", "doc_baseurl"))
    published = {(p.relative_to(NBS).parent / output_file(p)).as_posix() for p in pages()}
    words = "\n".join(without_code(o) for o in markdown(read_nb(proc / page.relative_to(NBS))))
    return [f"is linked by nbdev to {o}, which is not on the site" for o in re.findall(rf"{re.escape(base)}/([\w./-]+)", words)
            if o not in published]


def title_problems(page: Path) -> list:
    "The first text is `# Title` and `> subtitle` and nothing else: the site turns it into the page's head and drops the rest"
    first = next((source(c).strip() for c in read_nb(page).cells if c.cell_type == "markdown"), "")
    if not re.match(r"# \S.*\n+> \S", first):
        return ["begins without `# Title` and `> subtitle`"]
    if not re.fullmatch(r"# .+\n+> [^\n]+", first):
        return ["says more than title and subtitle in its first text cell, and the site would lose it: put it in the next cell"]
    return []


def config_problems(proc: Path, folder: Path) -> list:
    "Quarto's configuration names files that are there"
    def loaded(path):
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    files = [*loaded(NBS / "_quarto.yml")["metadata-files"], loaded(ROOT / "_quarto.yml")["format"]["html"]["css"]]
    found = [f"_quarto.yml names {f}, which is not there" for f in files if not (proc / f).exists()]
    for name, expected in (("sidebar.yml", sidebar_text()), ("nbdev.yml", (folder / "nbs" / "nbdev.yml").read_text(encoding="utf-8"))):
        if not (NBS / name).exists() or (NBS / name).read_text(encoding="utf-8") != expected:
            found.append(f"nbs/{name} is not up to date: run python tests/tools/website.py --write")
    return found


def problems() -> list:
    with tempfile.TemporaryDirectory() as folder:
        proc, found = build(Path(folder))
        found += config_problems(proc, Path(folder))
        there = [page for page in pages() if (proc / page.relative_to(NBS)).exists()]
        found += [f"{page_name(page)} is not on the site" for page in pages() if page not in there]
        for page in there:
            found += [f"{page_name(page)} {o}" for o in title_problems(page) + link_problems(page, proc) + symbol_problems(page, proc)]
    return found


def write():
    "Write nbs/sidebar.yml and nbs/nbdev.yml"
    (NBS / "sidebar.yml").write_text(sidebar_text(), encoding="utf-8")
    subprocess.run([sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"], cwd=ROOT, check=True)


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    found = problems()
    print(*found or ["the site is in order"], sep="\n")
    sys.exit(bool(found))
