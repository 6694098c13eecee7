"""Run pages, each in a process of its own.

A page must not see what another one left behind, and importing torch, timm and lightning anew costs 6 s a page. So one server imports
them once and every page is a fork of it. The server is a fresh process rather than the test process: a fork of a process whose OpenMP
threads already run can hang, and the server never computes.
"""
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from execnb.nbio import read_nb
from project import ROOT, code_cells, directives, page_name

PRELOAD = ["torch", "torchvision", "timm", "lightning", "torchmetrics", "pandas", "scipy.ndimage", "matplotlib.figure",
           "ipywidgets", "execnb.shell", "fastcore.test"]
FLAGS = ("slow", "gpu")  # `tst_flags` of settings.ini: cells that only a fresh execution of the page runs


def skipped(cell, flags=()) -> bool:
    "Cells with nothing to run, with `#| eval: false`, or with one of the flags"
    words = directives(cell)
    return cell.cell_type != "code" or words.get("eval:") == ["false"] or any(f in words for f in flags)


def run_page(path: Path, flags=()):
    "Run every cell of a page in its own folder. Returns the notebook with fresh outputs, and the traceback if a cell raised"
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    warnings.filterwarnings("ignore")
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    sys.argv = [path.name]  # not the arguments of the tests
    nb, shell = read_nb(path), CaptureShell(path)
    for cell in nb.cells:
        if cell.cell_type == "code" and not skipped(cell, flags):
            cell.outputs = []
    with working_directory(path.parent):
        try:
            shell.run_all(nb, exc_stop=True, preproc=lambda c: skipped(c, flags))
        except BaseException:
            return nb, shell.prettytb(fname=page_name(path))
    return nb, None


def kinds(cell) -> list:
    "What a cell shows, as a sorted list of mime types"
    return sorted({k for o in cell.get("outputs", []) for k in o.get("data", {o.get("name", o["output_type"]): 0})} - {"stderr"})


def stale(stored, fresh, flags=FLAGS) -> list:
    "Cells that show another kind of output than the stored page does"
    old = {c.id: kinds(c) for c in code_cells(stored)}
    return [f"cell {c.id} shows {kinds(c) or 'nothing'}, the stored page {old[c.id] or 'nothing'}" for c in code_cells(fresh)
            if not skipped(c, flags) and kinds(c) != old[c.id]]


def _child(path, flags, report):
    "The forked process: the page's own threads are one, its prints go to the report"
    import torch
    from offline import refuse_network
    log = open(report + ".log", "w", buffering=1)
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    torch.set_num_threads(1)
    refuse_network(attempts := [])
    start = time.perf_counter()
    nb, error = run_page(Path(path), flags)
    result = dict(error=error, seconds=time.perf_counter() - start, attempts=attempts)
    result["stale"] = [] if error else stale(read_nb(path), nb, flags)
    Path(report).write_text(json.dumps(result))


class PageRunner:
    "Forks pages from a server, `workers` at a time, one thread each"
    def __init__(self, workers=2, timeout=900):
        self.context, self.timeout = multiprocessing.get_context("forkserver"), timeout
        self.context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        self.pool = ThreadPoolExecutor(workers)
        with patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MPLBACKEND="agg", IN_TEST="1"):
            forkserver.ensure_running()

    def submit(self, path: Path, flags=FLAGS):
        "A future for the report of one page"
        return self.pool.submit(self._run, path, flags)

    def _run(self, path, flags):
        report = os.path.join(self.folder.name, page_name(path).replace("/", "-"))
        process = self.context.Process(target=_child, args=(str(path), flags, report))
        process.start()
        process.join(self.timeout)
        if late := process.is_alive():
            process.kill()
            process.join()
        log = Path(report + ".log").read_text(errors="replace") if Path(report + ".log").exists() else ""
        if Path(report).exists():
            return {**json.loads(Path(report).read_text()), "log": log}
        why = f"took more than {self.timeout} s" if late else f"ended with exit code {process.exitcode}"
        return dict(error=f"{page_name(path)} {why}\n{log[-4000:]}", seconds=0, attempts=[], stale=[], log=log)

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()
