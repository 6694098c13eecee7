"""A fit shared by two processes (Lightning's ddp on the CPU, gloo) is the fit of one, run as a user's script is."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import share_a_fit
import torch

from anomnb.data.read import list_images
from anomnb.engine.shares import take_share
from anomnb.export import load
from anomnb.models import Dfkde, Patchcore


@pytest.fixture(scope="module")
def shared(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("shared")
    free = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED")}
    command = [sys.executable, share_a_fit.__file__, str(toy / "train"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**free, "OMP_NUM_THREADS": "1"})
    assert not done.returncode, done.stderr[-3000:]
    assert not done.stdout and "rank" not in done.stderr.lower(), done.stdout + done.stderr  # quiet is quiet
    return Path(out)


@pytest.fixture(scope="module")
def alone(toy):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: features must differ by nothing but the batch they came in
    try: return dict(share_a_fit.models(list_images(toy / "train"), accelerator="cpu"))
    finally: torch.set_num_threads(threads)


def test_shares_are_a_partition():
    for n in range(20):
        for world in (1, 2, 3, 7):
            shares = [take_share(list(range(n)), r, world) for r in range(world)]
            assert sorted(sum(shares, [])) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def radius(rows, bank):
    return torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max()


@pytest.mark.parametrize("case", share_a_fit.CASES)
def test_both_end_with_the_model_of_one_process(shared, alone, toy, case):
    files = [shared / f"{case}.{rank}.safetensors" for rank in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()  # to the bit, with all that was gathered
    two, one = load(files[0]), alone[case]
    assert sorted(o["sha256"] for o in two.fitted_images) == sorted(o["sha256"] for o in one.fitted_images)
    first, more = share_a_fit.CASES[case][2:4]
    assert len(two.fitted_images) == first + more == len({o["sha256"] for o in two.fitted_images})
    if isinstance(one, Dfkde):  # every vector is kept, in another order
        a, b = (m.accumulator.rows[m.accumulator.rows[:, 0].argsort()] for m in (one, two))
        assert (a - b).abs().max() <= 1e-6*a.abs().max()
        return
    if not isinstance(one, Patchcore):
        a, b = one.accumulator.state(), two.accumulator.state()
        assert int(b["n"]) == first + more
        for k in a:
            assert (a[k] - b[k]).abs().max() <= 1e-6*a[k].abs().max(), k
        return
    images = torch.stack([o for b in loaded(toy, one, first) for o in b.images])
    rows = one.features(images).permute(0, 2, 3, 1).flatten(0, 2)
    direct = Patchcore(**one.args).build()
    direct.accumulator = direct.new_accumulator(first, None)
    direct.accumulator.update(direct.features(images))
    direct.finish()
    assert two.net.bank.shape == direct.net.bank.shape
    merges = max(0, two.accumulator.reductions - 1)
    assert radius(rows, two.net.bank) <= 2*(merges + 1)*radius(rows, direct.net.bank) + 1e-6*rows.norm(dim=1).max()
    assert ("bounded" in case) == (merges > 0)


def loaded(toy, model, n):
    from anomnb.data.loader import make_loader

    return make_loader([str(o) for o in list_images(toy / "train")[:n]], resize=model.pre.resize)


def test_what_one_process_meets_all_say_and_none_changes(shared):
    told = [json.loads((shared / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    found = told[0]
    assert "1 of 4 images can't be read" in found["broken"] and "array 3" in found["broken"]
    assert found["skipped"] == 3 and "nothing was fitted" in found["nothing"]
    assert "array 3" in found["infinite"] and "not finite" in found["infinite"]
    assert found["as it was"] and found["threshold"] > 0
