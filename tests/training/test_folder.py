"""A run's folder: only what runs wrote there is ever removed or replaced."""

import errno
import os
import shutil

import pytest

from condrl import RunError, UsageError
from condrl.training.folder import LOCK, MANIFEST, RunFolder


def write(folder, name, text="ours"):
    folder.file(name).write_text(text)


def names(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.fixture
def folder(tmp_path):
    """A run with a user's files among its own."""
    made = RunFolder(tmp_path)
    for name in ("config.yaml", "images/epoch_0001.png", "lora/weights", "checkpoints/epoch_00000001/state.json"):
        write(made, name)
    for name in ("notes.txt", "images/holiday.png", "lora/mine.safetensors", "checkpoints/epoch_best/state.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("the user's")
    return made


MINE = {"notes.txt", "images/holiday.png", "lora/mine.safetensors", "checkpoints/epoch_best/state.json"}


def test_clearing_leaves_what_no_run_wrote(folder, tmp_path):
    RunFolder(tmp_path).clear()  # as a later process does
    assert names(tmp_path) == MINE
    assert not (tmp_path / "checkpoints" / "epoch_00000001").exists()  # an empty folder of its own goes too
    assert RunFolder(tmp_path).listed == set()


def test_a_cleared_empty_run_leaves_an_empty_folder(tmp_path):
    made = RunFolder(tmp_path)
    write(made, "images/epoch_0001.png")
    made.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["../outside.txt", "{absolute}", "images/../../outside.txt", "link/inside.txt"])
def test_a_list_cannot_name_files_elsewhere(line, tmp_path):
    """Folders are exchanged: the list of one is not to be trusted."""
    outside, run = tmp_path / "outside.txt", tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    run.mkdir()
    (run / "link").symlink_to(tmp_path / "elsewhere")
    for path in (outside, tmp_path / "elsewhere" / "inside.txt"):
        path.write_text("the user's")
    (run / MANIFEST).write_text(line.format(absolute=outside) + "\n")
    RunFolder(run).clear()
    assert outside.exists()
    assert (tmp_path / "elsewhere" / "inside.txt").exists()


@pytest.mark.parametrize("line", ["images/", "./", "/", ".lora.part/../images/", "images"])
def test_a_list_cannot_name_whole_folders(line, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_text("the user's")
    (tmp_path / MANIFEST).write_text(line + "\n")
    RunFolder(tmp_path).clear()
    assert (tmp_path / "images" / "holiday.png").exists()


def test_a_line_that_was_cut_short_does_not_count(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "epoch").write_text("the user's")
    (tmp_path / MANIFEST).write_text("config.yaml\nimages/epoch")  # of images/epoch_0001.png
    assert RunFolder(tmp_path).listed == {"config.yaml"}


def test_a_folder_that_holds_other_things_is_refused(tmp_path):
    RunFolder(tmp_path / "new" / "deep").check()
    RunFolder(tmp_path).check()  # empty
    (tmp_path / LOCK).touch()  # of a process that was killed before it wrote anything
    RunFolder(tmp_path).check()
    (tmp_path / "holiday.png").touch()
    with pytest.raises(UsageError, match=r"holds holiday\.png, which no run wrote"):
        RunFolder(tmp_path).check()
    (tmp_path / "holiday.png").unlink()
    write(RunFolder(tmp_path), "config.yaml")
    (tmp_path / "holiday.png").touch()
    RunFolder(tmp_path).check()  # a run's, with a file of the user's beside it


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_a_folder_without_write_access_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(UsageError, match="cannot write to"):
        RunFolder(tmp_path / "run").check()


def test_links_are_not_written_through(folder, tmp_path):
    target = tmp_path.parent / "target.txt"
    target.write_text("the user's")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(RunError, match=r"metrics\.jsonl is a link"):
        folder.file("metrics.jsonl")
    (tmp_path / "plots").symlink_to(tmp_path.parent)
    with pytest.raises(RunError, match="plots is a link"):
        folder.file("plots/target.txt")
    (tmp_path / LOCK).symlink_to(target)
    with pytest.raises(UsageError, match="cannot write to the run's folder"), folder.locked():
        pass
    assert target.read_text() == "the user's"


def test_replacing_a_folder_keeps_the_users_files(folder, tmp_path):
    with folder.replacing("lora") as part:
        (part / "weights").write_text("new")
        (part / "card.md").write_text("new")
    assert (tmp_path / "lora" / "weights").read_text() == "new"
    assert (tmp_path / "lora" / "mine.safetensors").read_text() == "the user's"
    assert not part.exists()
    with folder.replacing("lora") as part:
        (part / "weights").write_text("newer")
    assert names(tmp_path / "lora") == {"weights", "mine.safetensors"}  # card.md was the run's, and is no more
    with pytest.raises(RunError, match=r"lora/mine\.safetensors is in the way"), folder.replacing("lora") as part:
        (part / "mine.safetensors").write_text("newest")
    assert (tmp_path / "lora" / "mine.safetensors").read_text() == "the user's"
    assert (part / "mine.safetensors").read_text() == "newest"  # nothing is lost
    folder.clear()
    assert names(tmp_path) == MINE


def test_what_a_killed_process_left_half_written_is_replaced(folder, tmp_path):
    folder.adopt([".lora.part/"])
    (tmp_path / ".lora.part").mkdir()
    (tmp_path / ".lora.part" / "half").write_text("hal")
    with folder.replacing("lora") as part:
        (part / "weights").write_text("new")
    assert names(tmp_path / "lora") == {"weights", "mine.safetensors"}


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(UsageError, match="another process is writing")
    with RunFolder(tmp_path).locked(), refused, RunFolder(tmp_path).locked():
        pass
    with RunFolder(tmp_path).locked(), pytest.raises(UsageError, match="another process is writing"):
        RunFolder(tmp_path).check()  # before any work
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize("change", ["moved", "removed", "another"])
def test_a_folder_that_is_moved_while_it_is_locked_is_not_made_anew(change, tmp_path):
    made = RunFolder(tmp_path / "run")
    with made.locked():
        write(made, "metrics.jsonl")
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if change == "removed":
            shutil.rmtree(tmp_path / "elsewhere")
        if change == "another":
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / LOCK).touch()
        for writing in (lambda: made.file("metrics.jsonl"), lambda: made.replacing("lora").__enter__()):
            with pytest.raises(RunError, match="was moved or removed while the run was writing to it"):
                writing()
    assert names(tmp_path / "run") == ({LOCK} if change == "another" else set())


@pytest.mark.parametrize("name", ["condrl", "images", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_refused(name, tmp_path):
    made = RunFolder(tmp_path)
    write(made, "config.yaml")
    (tmp_path / name).write_text("the user's")
    with pytest.raises(UsageError, match=f"{name} is in the way of a folder"):
        made.check()


def test_a_file_of_the_users_under_a_name_of_ours_is_not_replaced(folder, tmp_path):
    (tmp_path / "result.json").write_text("the user's")
    with pytest.raises(UsageError, match=r"result\.json is in the way"):  # before any work
        RunFolder(tmp_path).check()
    with pytest.raises(RunError, match=r"result\.json is in the way"):
        folder.file("result.json")
    assert (tmp_path / "result.json").read_text() == "the user's"


def test_a_torn_line_does_not_join_the_next(tmp_path):
    (tmp_path / MANIFEST).write_text("config.yaml\nmetri")
    write(RunFolder(tmp_path), "metrics.jsonl")
    assert RunFolder(tmp_path).listed == {"config.yaml", "metri", "metrics.jsonl"}


def test_a_half_written_folder_goes_with_the_run(folder, tmp_path):
    with pytest.raises(FileNotFoundError), folder.replacing("lora") as part:
        (part / "half").rename(part / "weights" if (part / "half").write_text("hal") > 3 else part / "no" / "folder")
    assert part.exists()
    RunFolder(tmp_path).clear()
    assert names(tmp_path) == MINE


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(number, tmp_path, monkeypatch, capsys):
    """Once; the run goes on, and so does one after it."""
    import fcntl

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(2):
        RunFolder(tmp_path).check()
        with RunFolder(tmp_path).locked():
            write(RunFolder(tmp_path), "config.yaml")
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{tmp_path} cannot be locked ([Errno {number}] {os.strerror(number)})" in said
