"""The command line as a user meets it: files left, words, errors, exit status."""
import json
import os
import subprocess
import sys

import pytest

from anomnb.core.errors import AnomnbError
from anomnb.core.names import MODELS, list_models

RUN = "from anomnb.cli.train import anomnb_train; anomnb_train()"


def train(*argv, cwd):
    env = {**os.environ, "ANOMNB_QUIET": "1"}
    return subprocess.run([sys.executable, "-c", RUN, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


@pytest.fixture(scope="module")
def ran(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    return train("--data", toy, "--image_size", "64", "--out", out, "coreset_ratio=0.05", cwd=out.parent), out


def test_a_run_leaves_what_it_says(ran):
    done, out = ran
    assert done.returncode == 0, done.stderr
    left = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "model.onnx", "model.xml", "model.bin", "run.json", "predictions.csv", "evaluation.json",
            "evaluation.html", "images"} <= left
    assert not [n for n in left if n.startswith(".")] and len(list((out / "images").iterdir())) >= 4
    assert str(out) in done.stdout and "PatchCore on tf_efficientnet_lite0" in done.stdout and "image_AUROC" in done.stdout


def test_the_record_tells_the_run_again(ran, toy):
    record = json.loads((ran[1] / "run.json").read_text())
    assert record["arguments"]["coreset_ratio"] == 0.05 and record["seeds"] == {"seed": 0} and record["arguments"]["data"] == str(toy)
    assert record["versions"]["torch"] and record["peak_memory_bytes"] > 1e7 and record["results"]["image_AUROC"] > 0
    assert {"fit", "test", "export torch", "export onnx"} <= set(record["seconds"])


def test_the_csv_has_a_row_an_image(ran, toy):
    rows = (ran[1] / "predictions.csv").read_text().splitlines()
    assert len(rows) - 1 == len(list((toy / "test").rglob("*.png"))) and rows[0].startswith("index,source,kind,label,score")


@pytest.mark.parametrize("argv, said", [
    (["--data", "no/such"], "no/such"),
    (["--model", "patchcor"], "did you mean 'patchcore'"),
    (["--backbone", "resnet81"], "did you mean"),
    (["coreset_ration=0.1"], "did you mean 'coreset_ratio'"),
    (["--max_memory", "lots"], "max_memory"),
])
def test_errors_are_one_line_and_status_2(argv, said, tmp_path, monkeypatch, capsys):
    from anomnb.cli.train import anomnb_train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anomnb_train", *argv])
    with pytest.raises(SystemExit) as e:
        anomnb_train()
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_holds_something_is_refused(toy, tmp_path):
    from anomnb.cli.train import anomnb_train

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_text("precious")
    with pytest.raises(AnomnbError, match="not empty"):
        anomnb_train(data=str(toy), image_size=64, out=str(tmp_path / "old"))
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("place", ["train", "benchmark", "info"])
def test_help_is_light_and_lists_the_words(place):
    code = (f"import sys; from anomnb.cli.{place} import anomnb_{place} as f; sys.argv = ['x', '--help']\n"
            "try: f()\nexcept SystemExit: pass\nprint('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("False")
    if place == "train":
        assert "coreset_ratio=0.1" in done.stdout and "--data" in done.stdout


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    from anomnb.data.toy import draw_toy
    return draw_toy(tmp_path_factory.mktemp("few") / "toy", n_train=12, n_good=2, n_defects=1, size=64)


@pytest.mark.filterwarnings("ignore:.* random weights")
@pytest.mark.parametrize("name", list_models())
def test_every_model_is_trained_by_the_command(name, few, tmp_path, capsys):
    from anomnb.cli.train import anomnb_train

    words = {k: v for k, v in MODELS[name]["tiny"].items() if k != "rotations"}
    anomnb_train(data=str(few), model=name, out=str(tmp_path / "run"), max_batches=2, batch_size=4, no_export=True, **{**words, "image_size": 64})
    assert (tmp_path / "run" / "model.safetensors").exists() and "image_AUROC" in capsys.readouterr().out


def test_a_grey_of_the_masks_can_be_left_out(few, tmp_path, capsys):
    from anomnb.cli.train import anomnb_train

    lite = dict(backbone="tf_efficientnet_lite0", image_size=64)
    anomnb_train(data=str(few), model="dfm", out=str(tmp_path / "run"), ignore=128, no_export=True, **lite)
    assert "grey 128 count in no metric" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["ignore"] == 128
    with pytest.raises(AnomnbError, match="from 0 to 255"):
        anomnb_train(data=str(few), model="dfm", out=str(tmp_path / "other"), ignore=300, **lite)


def test_info_lists_every_model_without_torch(capsys):
    code = "from anomnb.cli.info import anomnb_info; anomnb_info(); import sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(any(line.startswith(name + " ") for line in done.stdout.splitlines()) for name in list_models())
