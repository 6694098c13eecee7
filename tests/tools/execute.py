"""Execute notebooks and store their outputs: `python tests/tools/execute.py [nbs/room/NN_name.ipynb ...]` (all when none is named)."""
import os
import sys
from pathlib import Path

from execnb.nbio import write_nb
from nbdev.clean import nbdev_clean
from project import pages
from runner import run_page


def execute(path: Path) -> bool:
    "Run one page and write it back with fresh outputs; on an error nothing is written"
    nb, error = run_page(path)
    if error:
        print(error, file=sys.stderr)
        return False
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    write_nb(nb, path)
    nbdev_clean(str(path))
    return True


def main(names):
    chosen, failed = [Path(n).resolve() for n in names] or pages(), []
    for page in chosen:  # one process a page, so that no state leaks from one to the next
        pid = os.fork()
        if pid == 0:
            ok = execute(page)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0 if ok else 1)
        if os.waitpid(pid, 0)[1]:
            failed.append(page.name)
    print(f"{len(chosen) - len(failed)} pages executed", *(f"FAILED {f}" for f in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
