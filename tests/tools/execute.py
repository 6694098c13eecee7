"""Execute notebooks and store their outputs: `python tests/tools/execute.py [nbs/room/NN_name.ipynb ...]` (all pages when none is named)."""
import os
import sys
import warnings
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory

ROOT = Path(__file__).resolve().parents[2]


def skipped(cell) -> bool:
    "Cells that hold nothing to run, or say `#| eval: false`"
    return cell.cell_type != "code" or "#| eval: false" in "".join(cell.source)


def execute(path: Path) -> bool:
    "Run one page in its own folder and write it back with fresh outputs; on an error nothing is written"
    nb, shell = read_nb(path), CaptureShell(path)
    with working_directory(path.parent):
        try:
            shell.run_all(nb, exc_stop=True, preproc=skipped)
        except BaseException:
            print(shell.prettytb(fname=path), file=sys.stderr)
            return False
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
    write_nb(nb, path)
    return True


def main(names):
    warnings.filterwarnings("ignore")
    pages = [Path(n).resolve() for n in names] or sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))
    sys.path.insert(0, str(ROOT))
    failed = []
    for page in pages:  # one process a page, so that no state leaks from one to the next
        pid = os.fork() if len(pages) > 1 else 0
        if pid == 0:
            ok = execute(page)
            if len(pages) > 1:
                os._exit(0 if ok else 1)
            sys.exit(0 if ok else 1)
        if os.waitpid(pid, 0)[1]:
            failed.append(page.name)
    print(f"{len(pages) - len(failed)} pages executed", *(f"FAILED {f}" for f in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
