"""The gates: what is generated is up to date, what is stored is fit to be read, what is shipped is whole."""
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import notebooks
import pytest
import readme
import website
from project import LIB, ROOMS, ROOT, copy_sources, page_name, pages

PAGES = {page_name(p): p for p in pages()}


def listed(problems):
    assert not problems, "\n" + "\n".join(problems)


def test_pages_and_modules_pair():
    listed(notebooks.pairing())


def test_public_names_are_not_modules():
    listed(notebooks.name_clashes())


@pytest.mark.parametrize("name", PAGES)
def test_page_is_stored_well(name):
    listed(notebooks.format_problems(PAGES[name]) + notebooks.output_problems(PAGES[name]))


def test_readme_is_the_front_page():
    listed(readme.problems())


def test_links_and_outputs_of_the_front_page_are_seen_from_the_root():
    words = "[a](core/00_errors.ipynb#x) ![b](images/b.png) [c](https://c.org) [d](#d)\n```\n[e](core/e)\n```"
    assert readme.from_root(words) == words.replace("(core/00", "(nbs/core/00").replace("(images", "(nbs/images")
    pictures, picture = {}, {"data": {"image/png": "aGk=", "text/plain": ["<Figure>"]}}
    assert readme.shown(picture, "index_1", "what it shows", pictures) == "![what it shows](nbs/images/index_1.png)"
    assert pictures == {"index_1.png": b"hi"}
    assert readme.shown({"data": {"text/plain": ["1\n", "2"]}}, "", "", {}) == "    1\n    2"


def test_site():
    listed(website.problems())


def test_slug_is_pandocs():
    for heading, expected in {"`late`: the one seam downwards": "late-the-one-seam-downwards", "lazy_names": "lazy_names",
                              "3. Applications & *uses*": "applications-uses", "Prediction.map": "prediction.map", "33": "section"}.items():
        assert website.slug(heading) == expected


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for o in ("nbs", "anomnb") for p in (folder / o).rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.parametrize("command", ["nbdev_clean", "nbdev_export"])
def test_nbdev_changes_nothing(command, tmp_path):
    before = digests(copy_sources(tmp_path))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # in a test nbdev_export does nothing and says nothing
    subprocess.run([sys.executable, "-c", f"from nbdev.cli import {command}; {command}()"], cwd=tmp_path, env=env, check=True)
    after = digests(tmp_path)
    listed([f"{command} changes {n}" for n in sorted(before | after) if before.get(n) != after.get(n)])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel that pip builds from the unpacked sdist, with no file of the checkout in reach"
    folder = copy_sources(tmp_path_factory.mktemp("build"))
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", "sdist"], cwd=folder, check=True, capture_output=True)
    with tarfile.open(next((folder / "sdist").glob("*.tar.gz"))) as tar:
        tar.extractall(folder / "unpacked")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheel"]
    done = subprocess.run([*command, str(next((folder / "unpacked").iterdir()))], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return zipfile.ZipFile(next((folder / "wheel").glob("*.whl")))


def test_wheel_is_whole(wheel):
    shipped = {n for n in wheel.namelist() if n.startswith("anomnb/")}
    assert shipped == {p.relative_to(ROOT).as_posix() for p in LIB.rglob("*") if p.suffix == ".py" or p.name == "py.typed"}
    assert "anomnb/py.typed" in shipped and all(f"anomnb/{room}/__init__.py" in shipped for room in ROOMS)


def test_wheel_names_commands_and_requirements(wheel):
    info = {Path(n).name: wheel.read(n).decode() for n in wheel.namelist() if ".dist-info/" in n}
    scripts = ConfigParser(delimiters=["="])
    scripts.read_string(info["entry_points.txt"])
    assert dict(scripts["console_scripts"]) == {f"anomnb_{n}": f"anomnb.cli.{n}:anomnb_{n}" for n in ("train", "benchmark", "info")}
    assert not re.search(r"^Requires-Dist: (nbdev|pytest|ruff)\b(?!.*extra ==)", info["METADATA"], re.M)


def test_wheel_says_its_licence(wheel):
    assert any(Path(n).name == "LICENSE" for n in wheel.namelist())
