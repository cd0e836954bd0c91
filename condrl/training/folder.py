"""A run's folder. What the program writes there is on a list in it, and nothing else is ever removed or replaced."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from condrl.errors import RunError, UsageError, naming, print_main

MANIFEST = "condrl_files.txt"  # the list: a path per line
LOCK = "lock"
OWN = (  # what every run writes, or many do
    *("config.yaml", "base.json", "metrics.jsonl", "timings.jsonl", "result.json", "heldout.jsonl", "report.html"),
    *("heldout/[0-9]*_base.png", "heldout/[0-9]*_tuned.png", "film/epoch_[0-9]*.png"),
    "evaluations/epoch_[0-9]*.jsonl",
    *("images/epoch_[0-9]*.png", "images/before_after.png", "images/before_after_[0-9]*.png"),
    *("images/density.png", "images/plane.png"),
    *("images/objective.png", "lora/pytorch_lora_weights.safetensors", "lora/comfyui_lora.safetensors"),
    *("lora/network.safetensors", "lora/README.md", "value/network.safetensors"),
)
FOLDERS = (
    "images",
    "heldout",
    "film",
    "evaluations",
    "lora",
    "value",
    "checkpoints",
    "condrl",
)  # where a run, or its trackers, write
PART = re.compile(r"\.\w+\.part/")  # a folder that is still being written
OF_EPOCH = re.compile(r"(?:film|images|evaluations)/epoch_(\d+)")
LONGEST_NAME = 255  # bytes, of the usual file systems


class RunFolder:
    """A folder whose files are listed before they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: set[str] | None = None
        self._lock: os.stat_result | None = None  # of the lock's file, while this process holds it

    @property
    def listed(self) -> set[str]:
        """The relative paths of what runs wrote here; a line that was cut short does not count."""
        if self._listed is None:
            text = self._read_manifest()
            lines = text[: text.rfind("\n") + 1].split("\n")
            self._listed = {line for line in lines if _is_inside(line)}
        return self._listed

    def _read_manifest(self) -> str:
        manifest = self.path / MANIFEST
        try:
            return manifest.read_text("utf-8") if manifest.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {manifest}, the list of what runs wrote there: {error}") from error

    @property
    def is_run_folder(self) -> bool:
        return (self.path / MANIFEST).is_file()

    @property
    def holds_run(self) -> bool:
        """Whether something that a run wrote is still there."""
        return any((self.path / name).exists() for name in self.listed)

    # ------------------------------------------------------------------------------------------ checking

    def check(self, is_locked: bool = False) -> None:
        """Check that a run can write here; `is_locked` if this process has locked the folder.

        Raises: UsageError when it cannot, or when the folder belongs to somebody else.
        """
        if re.search(r"[\x00-\x1f\x7f-\x9f]", str(self.path)):
            raise UsageError(f"the run's folder cannot be {str(self.path)!r}: there are control characters in its name")
        try:
            there, _ = self.path.exists(), os.fsencode(self.path)
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        except (OSError, ValueError) as error:
            raise UsageError(f"the run's folder cannot be made: {error}") from error
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in self.path.parts):
            raise UsageError(f"the run's folder cannot be made: its name is longer than {LONGEST_NAME} bytes")
        if not existing.is_dir():
            raise UsageError(f"the run's folder cannot be {self.path}: {existing} is a file; choose another run.name=")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {existing}: choose another folder with run.dir=")
        foreign = [p.name for p in self.path.iterdir() if p.name != LOCK] if there and not self.is_run_folder else []
        if foreign:
            raise UsageError(
                f"{self.path} holds {min(foreign)}, which no run wrote (there is no {MANIFEST}): choose another "
                "run.name= or run.dir=, a folder that is empty or does not exist yet"
            )
        for name in (*FOLDERS, MANIFEST, LOCK, *(n for n in OWN if "*" not in n)):
            self._check_no_link(self.path / name, UsageError)
        if not is_locked:
            self._check_lock()
        taken = [n for n in self.files_in("") - self.listed if any(fnmatch.fnmatch(n, known) for known in OWN)]
        for name in FOLDERS:
            if (self.path / name).is_file():
                raise UsageError(f"{self.path / name} is in the way of a folder: move it elsewhere")
        if there and taken:
            raise UsageError(f"{self.path / min(taken)} is in the way, and no run wrote it: move it elsewhere")

    def _check_lock(self) -> None:
        """Raises: UsageError when another process is writing to the folder."""
        path = self.path / LOCK
        if path.is_file() and not path.is_symlink() and sys.platform != "win32":
            import fcntl

            with path.open("rb+") as file, suppress(OSError):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._taken() from None

    def _taken(self) -> UsageError:
        return UsageError(f"another process is writing to {self.path}: wait for it, or choose another folder")

    # ------------------------------------------------------------------------------------------ writing

    def claim(self, name: str) -> Path:
        """Where to write the file of that relative path, which is on the list from now on.

        Raises: RunError where a link would lead out of the folder, where a file is in the way that no run wrote, or
            when the folder was moved or removed while it was locked.
        """
        self._check_in_place()
        path = self.path
        for part in PurePosixPath(name).parts:
            path = path / part
            self._check_no_link(path, RunError)
        if name not in self.listed and path.exists():
            raise RunError(f"{path} is in the way, and no run wrote it: move it elsewhere")
        self.adopt([name])
        return path

    def _check_no_link(self, path: Path, error: type[Exception]) -> None:
        if path.is_symlink():
            raise error(f"{path} is a link, and a run does not write through links: remove it")

    def claim_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.claim(name)

    def adopt(self, names: Iterable[str]) -> None:
        """List files that are there already, written by a library."""
        new = sorted(set(names) - self.listed)
        if new:
            self._check_no_link(self.path / MANIFEST, RunError)
            torn = self._read_manifest()[-1:] not in ("", "\n")  # a line that was cut short stands alone
            path = self.path / MANIFEST
            with naming(path), path.open("a", encoding="utf-8") as manifest:
                manifest.write("\n" * torn + "".join(f"{name}\n" for name in new))
            self.listed.update(new)

    def file(self, name: str) -> Path:
        """As `claim`, and the folder of the file exists."""
        path = self.claim(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a new folder; at the end its files replace those that runs wrote into the folder `name`.

        Raises: RunError where a file is in the way that no run wrote; the new ones are then in the folder yielded.
        """
        part = f".{name}.part"
        self._check_in_place()
        self.adopt([f"{part}/"])
        self._remove([f"{part}/"])  # left by a process that was killed
        (self.path / part).mkdir()
        with naming(self.path / part):
            yield self.path / part
        moves = {each: name + each.removeprefix(part) for each in sorted(self.files_in(part))}
        for target in moves.values():
            if target not in self.listed and (self.path / target).exists():
                raise RunError(
                    f"{self.path / target} is in the way, and no run wrote it; see {self.path / part} instead"
                )
        self.remove(name, but=moves.values())
        for each, target in moves.items():
            (self.path / each).replace(self.file(target))
        _remove_empty(self.path / part, self.path)

    def files_in(self, name: str) -> set[str]:
        """The relative paths of all files in one of its folders, but for links."""
        paths = (self.path / name).rglob("*")
        return {p.relative_to(self.path).as_posix() for p in paths if p.is_file() and not p.is_symlink()}

    # ------------------------------------------------------------------------------------------ removing

    def clear(self) -> None:
        """Remove what runs wrote, and the folders that this leaves empty."""
        self._remove(self.listed)
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._listed = None

    def drop_after(self, epoch: int) -> None:
        """Remove the pictures and evaluations that were made after an epoch."""
        numbers = {name: OF_EPOCH.match(name) for name in self.listed}
        self._remove([name for name, number in numbers.items() if number and int(number[1]) > epoch])

    def remove(self, name: str, but: Collection[str] = ()) -> None:
        """Remove what runs wrote into one of its folders."""
        self._remove([each for each in self.listed if each.startswith(f"{name}/") and each not in but])

    def _remove(self, names: Collection[str]) -> None:
        for name in sorted(names):
            path = self.path / name
            if not path.parent.resolve().is_relative_to(self.path.resolve()):
                continue  # through a link that leads elsewhere
            if PART.fullmatch(name) and not path.is_symlink():  # the only folders that are wholly a run's
                shutil.rmtree(path, ignore_errors=True)
            elif not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
            _remove_empty(path.parent, self.path)

    # ------------------------------------------------------------------------------------------ one run at a time

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other process can tune, or write an evaluation, in the folder.

        Raises: UsageError when one does, or when the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise UsageError(f"cannot write to the run's folder: {error}") from error
        with os.fdopen(handle, "rb+") as file:
            if sys.platform != "win32":
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._taken() from None
                except OSError as error:  # some network file systems have no locks
                    print_main(f"warning: {self.path} cannot be locked ({error}): make sure that no other run uses it")
            self._lock = os.fstat(file.fileno())
            try:
                yield
            finally:
                self._lock = None

    def _check_in_place(self) -> None:
        """Raises: RunError when the folder that is locked was moved or removed meanwhile."""
        if self._lock is None:
            return
        try:
            is_same = os.path.samestat(self._lock, (self.path / LOCK).stat())
        except OSError:
            is_same = False
        if not is_same:
            raise RunError(f"the run's folder {self.path} was moved or removed while the run was writing to it")


def _is_inside(name: str) -> bool:
    """Whether a line of the list names a file in the folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def _remove_empty(path: Path, root: Path) -> None:
    """Remove a folder below `root` if it is empty, and then its parents."""
    while path != root and path.is_dir() and not any(path.iterdir()):
        path.rmdir()
        path = path.parent
