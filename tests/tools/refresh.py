"""Bring everything that is generated up to date: modules, rooms' names, README, sidebar: `python tests/tools/refresh.py`."""
import os
import subprocess
import sys
from pathlib import Path

from project import ROOT

HERE = Path(__file__).parent
NBDEV = ["-c", "from nbdev.cli import nbdev_clean, nbdev_export; nbdev_export(); nbdev_clean()"]
STEPS = [NBDEV, [HERE / "names.py"], [HERE / "readme.py"], [HERE / "website.py", "--write"]]


def main():
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    sys.exit(max([subprocess.run([sys.executable, *step], cwd=ROOT, env=env).returncode for step in STEPS]))


if __name__ == "__main__":
    main()
