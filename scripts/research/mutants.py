"""Which bugs would the tests let through? Breaks the code in small ways, one at a time, and runs the tests for it.

    python scripts/research/mutants.py                          all of them: an hour or two on one core
    python scripts/research/mutants.py --only ctrl.py nft       those whose file, text or tests contain a word
    python scripts/research/mutants.py --list                   what they are; nothing is run
    python scripts/research/mutants.py --all-tests              the whole quick suite for each, not the tests it names

A mutant is a text of a file that becomes another; they are in mutants.txt. The work is done on a temporary copy of
the repository, so nothing of yours is touched. The quick tests have to pass before anything is broken; the slow ones
are run on what they let through. A text that is not found exactly once is refused: the code has changed, and the
mutant has to follow. The exit code is 1 when one survives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import accelerate  # noqa: F401  (imported here once, for all)
import diffusers  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".txt")
LIMIT = 900  # seconds for the tests of a mutant


@dataclass(frozen=True)
class Mutant:
    """A bug, and the test files that should find it."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def read(text: str) -> list[Mutant]:
    """The mutants of a text such as mutants.txt, which says how they are written."""
    found, file, tests, entry = [], "", "", Entry("")
    for line in [*text.splitlines(), ""]:
        if line.startswith("== "):
            file, tests = line.removeprefix("== ").split(": ")
        elif line.startswith("-"):
            entry.old.append(line[2:])
        elif line.startswith("+"):
            entry.new.append(line[2:])
        elif line and not line.startswith("#"):
            entry = Entry(line)
        elif entry.old:
            found.append(entry.mutant(file, tests))
            entry = Entry("")
    return found


@dataclass
class Entry:
    """A mutant that is being read."""

    what: str
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def mutant(self, file: str, tests: str) -> Mutant:
        files = {file.stem: file for file in (ROOT / "tests").rglob("test_*.py")}
        paths = tuple(str(files[f"test_{name}"].relative_to(ROOT)) for name in tests.split())
        return Mutant(self.what, file, "\n".join(self.old), "\n".join(self.new), paths)


# ---------------------------------------------------------------------------------------------- running them


def main(words: Sequence[str]) -> int:
    """Exit code: 0 when every mutant is killed, 1 when one survives, 2 when one does not fit the code."""
    arguments = parser().parse_args(words)
    chosen = [m for m in read(LIST.read_text("utf-8")) if fits(m, arguments.only)]
    if misfits := [m for m in chosen if (ROOT / m.file).read_text("utf-8").count(m.old) != 1]:
        print("these texts are not found exactly once; the code has changed, and the mutants have to follow:")
        print("\n".join(f"  {m}: {m.old!r}" for m in misfits))
        return 2
    if arguments.list:
        print("\n".join(f"{m}  [{' '.join(m.tests)}]" for m in chosen))
        return 0
    with copied() as copy:
        return report(list(verdicts(chosen, copy, arguments.all_tests)))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of a mutant's file, text or tests")
    found.add_argument("--list", action="store_true", help="list them; run nothing")
    found.add_argument("--all-tests", action="store_true", help="run the whole quick suite for each")
    return found


def fits(mutant: Mutant, words: Sequence[str]) -> bool:
    return not words or any(word in f"{mutant} {' '.join(mutant.tests)}" for word in words)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of what git tracks and of what it does not ignore, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        # else an installation for development would take the plugins of the checkout that it points to
        (copy / "condrl" / "plugins").symlink_to(Path("..") / "plugins")
        yield copy


def verdicts(mutants: Iterable[Mutant], copy: Path, everything: bool) -> Iterator[tuple[Mutant, str, float]]:
    """Each mutant with its outcome and seconds; each line is printed as soon as it is known."""
    sound: dict[tuple[str, ...], str] = {}
    for mutant in mutants:
        tests = ("tests",) if everything else mutant.tests
        if tests not in sound:
            sound[tests] = tested(copy, tests, "not slow")
        began = time.monotonic()
        found = broken(mutant, copy, tests) if sound[tests] == "survived" else "its tests fail without it"
        seconds = time.monotonic() - began
        print(f"{found:<26}{seconds:>6.0f} s  {mutant}", flush=True)
        yield mutant, found, seconds


def broken(mutant: Mutant, copy: Path, tests: Sequence[str]) -> str:
    """The tests' verdict on the copy with the mutant in it: the quick ones', or if it survives, the slow ones'."""
    file = copy / mutant.file
    whole = file.read_text("utf-8")
    file.write_text(whole.replace(mutant.old, mutant.new), "utf-8")
    try:
        quick = tested(copy, tests, "not slow")
        return tested(copy, tests, "slow") if quick == "survived" else quick
    finally:
        file.write_text(whole, "utf-8")


def tested(copy: Path, tests: Sequence[str], which: str) -> str:
    """`survived` when the tests pass, `killed` when one fails, or what else happened."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, tests, which))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return "killed (took too long)"
    return {0: "survived", 1: "killed", 5: "survived"}.get(  # 5: there are no such tests
        process.exitcode or 0, f"not tested (pytest: {process.exitcode})"
    )


def run_tests(copy: Path, tests: Sequence[str], which: str) -> None:
    """In a process of its own, forked from this one, which has done the slow imports; prints nothing."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", which, *tests]))


def report(found: Sequence[tuple[Mutant, str, float]]) -> int:
    """Print the survivors as a table; returns the exit code."""
    left = [(mutant, verdict) for mutant, verdict, _ in found if not verdict.startswith("killed")]
    print(f"\n{len(found) - len(left)} of {len(found)} mutants were killed")
    for mutant, verdict in left:
        print(f"| {verdict} | {mutant.file} | {mutant.what} | {' '.join(mutant.tests)} |")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
