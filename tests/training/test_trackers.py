"""What trackers are given: read back from their own files, or, of a package that is missing, from one in its place."""

import json
import os
import shutil
import sqlite3
import sys
import textwrap
import tomllib
import types
import typing
from collections import defaultdict
from io import BytesIO
from itertools import pairwise

import accelerate.tracking
import numpy as np
import pytest
import yaml
from accelerate.utils import LoggerType
from helpers import ROOT, toy_words
from PIL import Image

from condrl.commands import finetune
from condrl.config import RunConfig
from condrl.io.overrides import flatten
from condrl.loading import load_config
from condrl.training.folder import RunFolder
from condrl.training.pictures import labelled
from condrl.training.trackers import Trackers, import_trackio, last_steps

ALL = ("tensorboard", "wandb", "trackio")
STAND_IN = """
    import json, os
    from pathlib import Path

    import numpy as np

    HERE = os.environ.get("TRACKIO_DIR")  # as trackio does, when it is imported
    config = {}

    class Image:
        def __init__(self, image, caption):
            self.content = {"pixels": np.asarray(image).tolist(), "caption": caption}

    class Run:
        def __init__(self, file, options):
            self.file = file
            self.write({"options": options})

        def write(self, line):
            with self.file.open("a") as rows:
                rows.write(json.dumps(line, default=lambda image: image.content) + chr(10))

        def log(self, values, step):
            self.write({"step": step, "values": values})

        def finish(self):
            self.write({"finished": True})

    def init(project, **options):
        return Run(Path(options.get("dir") or HERE) / f"{__name__}_rows.jsonl", options)
"""
FEW = [
    *("train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8", "train.updates_per_epoch=2"),
    *("sampler.steps=2", "evaluate.prompts=4", "evaluate.pictures=2", "evaluate.every=1"),
    "prompts.validation=null",
    *("train.lr_decay=none", "run.checkpoint_seconds=0", "run.name=watched"),
]


def in_place_of_missing(packages, folder, patch):
    """Have accelerate find these packages; returns which of them are stand-ins."""
    available = accelerate.tracking.get_available_trackers()
    missing = [name for name in packages if LoggerType(name) not in available]
    for name in missing:
        (folder / f"{name}.py").write_text(textwrap.dedent(STAND_IN))
    patch.setattr(accelerate.tracking, "_available_trackers", [*available, *map(LoggerType, missing)])
    patch.syspath_prepend(folder)
    return missing


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a run that lost its second epoch, and was resumed with one more epoch and another tracker."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("TRACKIO_DIR", raising=False)
        in_place_of_missing(("wandb", "trackio"), folder, patch)
        run = folder / "run"
        words = [*FEW, f"run.dir={run}"]
        assert finetune.main([*words, "train.epochs=2", "run.trackers=[tensorboard,trackio]"]) == 0
        shutil.rmtree(run / "checkpoints" / "epoch_00000002")  # as if it had been killed before it wrote that
        more = ["train.epochs=3", "run.resume=auto", "run.trackers=[tensorboard,wandb,trackio]"]
        assert finetune.main([*words, *more]) == 0
        assert "TRACKIO_DIR" not in os.environ
        other = toy_words("nft", folder / "other")
        assert finetune.main([*other, "train.epochs=1", "run.trackers=[trackio]"]) == 0
        yield run
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------- reading back


def series(tracker, run):
    """What a tracker has, in its order: [(step, value), ...] by name; images as (pixels, caption)."""
    if tracker == "tensorboard":
        return of_events(run / "condrl")
    found = defaultdict(list)
    for step, row in rows(tracker, run / "condrl"):
        for name, value in row.items():
            found[name].append((step, value))
    return found


def of_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in events.Tags()["images"]:
        found[name] = [(e.step, (pixels(BytesIO(e.encoded_image_string)), None)) for e in events.Images(name)]
    return found


def rows(tracker, folder):
    written = folder / f"{tracker}_rows.jsonl"
    if written.exists():
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        return [(line["step"], {n: stand_in(v) for n, v in line["values"].items()}) for line in lines if "step" in line]
    return trackio_rows(folder) if tracker == "trackio" else wandb_rows(folder)


def stand_in(value):
    return (np.array(value["pixels"]), value["caption"]) if isinstance(value, dict) else value


def trackio_rows(folder):
    database = sqlite3.connect(folder / "condrl.db")
    found = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({row[:2] for row in found}) == 1  # the resumed run is the same one
    read = [(step, json.loads(metrics)) for _, _, step, metrics in found]
    media = folder / "media"
    return [
        (
            step,
            {n: (pixels(media / v["file_path"]), v["caption"]) if isinstance(v, dict) else v for n, v in row.items()},
        )
        for step, row in read
    ]


def wandb_rows(folder):
    """Of offline runs, whose history a step may be in several parts of."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = defaultdict(dict)
    for run in sorted((folder / "wandb").glob("offline-run-*")):
        for content in log_records(next(run.glob("*.wandb")).read_bytes()):
            row = defaultdict(dict)
            for item in Record.FromString(content).history.item:
                name, *part = item.nested_key
                row[name][part[0] if part else ""] = json.loads(item.value_json)
            for name, parts in row.items():
                file = run / "files" / parts.get("path", "")
                found[row["_step"][""]][name] = (pixels(file), parts.get("caption")) if "path" in parts else parts[""]
    return [(step, row) for step, row in found.items()]


def log_records(content):
    """The records of a LevelDB log (blocks of 32 kB; a checksum, a length and a type before each part)."""
    position, parts = 7, b""
    while position < len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def settings(tracker, run):
    """The settings that a tracker was given first."""
    folder = run / "condrl"
    if tracker == "tensorboard":
        return hyperparameters(min(folder.glob("[0-9]*/events*")).parent)
    written = folder / f"{tracker}_rows.jsonl"
    if written.exists():
        return json.loads(written.read_text().splitlines()[0])["options"]["config"]
    if tracker == "trackio":
        (found,) = sqlite3.connect(folder / "condrl.db").execute("SELECT config FROM configs").fetchone()
        return {name: value for name, value in json.loads(found).items() if not name.startswith("_")}
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(content) for content in log_records(file.read_bytes())]
    given = next(record.run.config.update for record in records if record.WhichOneof("record_type") == "run")
    return {item.key: json.loads(item.value_json) for item in given if item.key != "_wandb"}


def hyperparameters(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    metadata = EventAccumulator(str(folder)).Reload().SummaryMetadata("_hparams_/session_start_info")
    found = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


# ---------------------------------------------------------------------------------------------- what they have


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ALL)
def test_every_number_is_there_once(tracker, watched):
    """Those of the base model, of each epoch and of the result, whichever epoch was done twice."""
    found = series(tracker, watched)
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((watched / "result.json").read_text())
    expected = defaultdict(list)
    for step, row in enumerate([result["before"], *lines]):
        for name, value in row.items():
            if name != "diagnosis":
                expected[name].append((step, value))
    assert [step for step, _ in expected["heldout/shapes"]] == [0, 1, 2, 3]
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in values], rel=1e-6, abs=1e-6), name
    *_, last = found["result/shapes/difference"]
    assert last == (3, pytest.approx(result["heldout"]["shapes"]["difference"]["mean"], abs=1e-6))
    assert [step for step, _ in found["seconds/rollout"]] == ([1, 2, 3] if tracker != "wandb" else [2, 3])
    for name, values in found.items():
        assert all(a < b for (a, _), (b, _) in pairwise(values)), name


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ALL)
def test_pictures_are_of_the_same_prompts_and_noise(tracker, watched):
    """Each with its prompt and scores; those of the base model are the ones that heldout.jsonl has."""
    found = series(tracker, watched)
    lines = [json.loads(line) for line in (watched / "heldout.jsonl").read_text().splitlines()]
    for number in (0, 1):
        scores = ", ".join(f"{name} {value:.2f}" for name, value in lines[number]["base"].items())
        caption = f"{lines[number]['prompt']} [{scores}]"
        steps = [step for step, _ in found[f"film/{number}"]]
        assert steps == ([0, 1, 2, 3] if tracker != "wandb" else [0, 2, 3])  # it came when 1 was over
        for step, (image, text) in found[f"film/{number}"]:
            file = watched / "film" / f"epoch_{step:05d}_{number}.png"
            if tracker == "tensorboard" and step == 0:
                assert np.array_equal(image, np.asarray(labelled(Image.open(file), caption)))
            elif tracker != "tensorboard":
                assert np.array_equal(image[..., :3], pixels(file))
                assert text.startswith(f"{lines[number]['prompt']} [shapes")
                assert step or text == caption
    step, (image, _) = found["before_after"][-1]
    assert step == 3
    assert np.array_equal(image[..., :3], pixels(watched / "images" / "before_after.png"))


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ALL)
def test_the_settings_are_there_under_dotted_keys(tracker, watched):
    found = settings(tracker, watched)
    assert (found["model.name"], found["train.lr"], found["rewards.shapes.weight"]) == ("stable_diffusion", 2e-3, 1.0)
    config = flatten(yaml.safe_load((watched / "config.yaml").read_text()))
    free = {name for name in config if name.startswith("run.")} | {"train.epochs"}  # which the resumed run changed
    assert found.keys() == config.keys()
    for name in config.keys() - free:
        value = float(config[name]) if isinstance(found[name], float) else config[name]
        assert str(found[name]).translate(str.maketrans("()", "[]")) == str(value), name


@pytest.mark.slow
def test_the_trackers_files_are_the_runs(watched):
    listed = set((watched / "condrl_files.txt").read_text().split("\n"))
    paths = [path for path in watched.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.relative_to(watched).as_posix() for path in paths} - listed == {"condrl_files.txt", "lock"}


@pytest.mark.slow
def test_a_second_run_in_a_process_has_its_own_folder(watched):
    found = series("trackio", watched.parent / "other")
    (line,) = map(json.loads, (watched.parent / "other" / "metrics.jsonl").read_text().splitlines())
    assert found["reward/total"] == [(1, pytest.approx(line["reward/total"]))]


def test_trackio_writes_into_each_runs_folder_or_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trackio.py").write_text(textwrap.dedent(STAND_IN))
    for folder in ("first", "second"):
        import_trackio(tmp_path / folder)
        assert str(tmp_path / folder) == sys.modules["trackio"].HERE
        assert "TRACKIO_DIR" not in os.environ
    monkeypatch.setenv("TRACKIO_DIR", "mine")
    import_trackio(tmp_path / "third")
    assert sys.modules["trackio"].HERE == os.environ["TRACKIO_DIR"] == "mine"
    del sys.modules["trackio"]


# ---------------------------------------------------------------------------------------------- once


class Recorded:
    """A tracker, and the accelerator that starts it; it may be killed while it logs."""

    name = "tensorboard"

    def __init__(self):
        self.trackers, self.logged, self.shown, self.is_killed, self.finished = [], [], [], False, 0

    def init_trackers(self, project, init_kwargs):
        self.trackers.append(self)

    def store_init_configuration(self, settings):
        self.settings = settings

    def log(self, values, step):
        if self.is_killed:
            raise KeyboardInterrupt
        self.logged.append((step, values))

    def log_images(self, values, step, dataformats):
        self.shown.append((step, *values))

    def finish(self):
        self.finished += 1


def started(tracker, folder, is_main=True):
    trackers = Trackers(RunFolder(folder), types.SimpleNamespace(accelerator=tracker, is_main=is_main))
    return trackers, trackers.running(load_config([*toy_words("nft", folder), "run.trackers=[tensorboard]"]))


def test_a_step_is_logged_once_even_if_the_run_was_killed_meanwhile(tmp_path):
    tracker, image = Recorded(), Image.new("RGB", (4, 4))
    trackers, running = started(tracker, tmp_path)
    with running:
        trackers.log(0, {"a": 0.0})
        trackers.show("film/0", image, "a cat")
        trackers.log(1, {"a": 1.0})
        trackers.log(1, {"result": 1.5}, "result")
        trackers.log(1, {"a": 1.0})
        tracker.is_killed = True
        with pytest.raises(KeyboardInterrupt):
            trackers.log(2, {"a": 2.0})
    tracker.is_killed = False
    trackers, running = started(tracker, tmp_path)  # from the checkpoint of the first epoch
    with running:
        trackers.log(0, {"a": 0.0})
        trackers.log(1, {"result": 1.5}, "result")
        trackers.show("film/0", image, "a cat")
        trackers.log(2, {"a": 2.0})  # it may have it, or a part
        trackers.log(3, {"a": 3.0})
        trackers.log(3, {"result": 3.5}, "result")
    steps = [(0, {"a": 0.0}), (1, {"a": 1.0}), (1, {"result": 1.5}), (3, {"a": 3.0}), (3, {"result": 3.5})]
    assert tracker.logged == steps
    assert tracker.shown == [(1, "film/0")]
    assert (tracker.finished, tracker.trackers) == (2, [])
    assert tracker.settings["algorithm.name"] == "nft"


def test_other_processes_start_no_trackers(tmp_path):
    tracker = Recorded()
    trackers, running = started(tracker, tmp_path, is_main=False)
    with running:
        trackers.log(0, {"a": 0.0})
    assert tracker.logged == []
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("tracker", ALL)
def test_a_missing_package_is_named_before_any_work(tracker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    monkeypatch.setattr("condrl.training.build.make_rewards", pytest.fail)
    assert finetune.main([*toy_words("nft", tmp_path / "run"), f"run.trackers=[{tracker}]"]) == 2
    error = capsys.readouterr().err
    assert f"{tracker} is not installed: pip install 'condrl[{tracker}]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_each_tracker_has_an_extra():
    (names,) = typing.get_args(typing.get_type_hints(RunConfig)["trackers"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(typing.get_args(names)) == set(ALL)
    assert {name: extras[name] for name in ALL} == {name: [name] for name in ALL}


def test_a_line_cut_short_does_not_count(tmp_path):
    path = tmp_path / "logged.txt"
    assert last_steps(path) == {}
    path.write_text("tensorboard epoch 9\nwandb epoch 3\ntensorboard epoch 10\ntensorboard result 10\nwandb epoch 4")
    steps = {("tensorboard", "epoch"): 10, ("wandb", "epoch"): 3, ("tensorboard", "result"): 10}
    assert last_steps(path) == steps
    with path.open("a") as file:
        file.write("wandb epoch 5\n")  # by the run that is resumed
    assert last_steps(path) == {**steps, ("wandb", "epoch"): 5}
