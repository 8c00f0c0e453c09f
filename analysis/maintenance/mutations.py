"""Mutation check: makes each fault of mutations.toml in a copy of the repository and runs the tests that catch it.

Run ``python -m qlens.analysis.maintenance.mutations``, with words of the names of faults to try these alone.

The exit code is 1 if a fault is not caught, or if the text that it replaces is no longer there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.toml")


def copy(folder: Path) -> None:
    """Copy the files that git tracks, and the links among them."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)


def is_caught(folder: Path, fault: dict) -> bool:
    """Whether a test fails under a fault.

    Raises:
        LookupError: the text to replace does not stand in the file exactly once.
    """
    path = folder / fault["file"]
    source = path.read_text()
    if source.count(fault["old"]) != 1:
        raise LookupError(f"{fault['file']} holds {fault['old']!r} {source.count(fault['old'])} times, not once")
    path.write_text(source.replace(fault["old"], fault["new"]))
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *fault["tests"]],
            cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)},
        )  # fmt: skip
    finally:
        path.write_text(source)
    if run.returncode not in (0, 1):
        raise LookupError(f"pytest ends with {run.returncode}: {run.stdout[-400:]}{run.stderr[-400:]}")
    return run.returncode == 1


def main(words: list[str]) -> int:
    """Try the faults whose name holds one of the words; all by default."""
    faults = tomllib.loads(LIST.read_text())["fault"]
    chosen = [fault for fault in faults if not words or any(word in fault["name"] for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        for fault in chosen:
            try:
                verdict = "caught" if is_caught(Path(folder), fault) else "NOT CAUGHT"
            except LookupError as error:
                verdict = f"NOT TRIED: {error}"
            survivors += verdict != "caught"
            print(f"{verdict:10}  {fault['name']}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
