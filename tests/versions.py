"""Run the tests that depend on another package's version with several versions of it, and print a table.

    python tests/versions.py torch 2.10 2.11 2.12 2.13
    python tests/versions.py transformers 5.0 5.24

Each version is installed into a folder of its own, which then stands before this environment's packages. With --folder
it is kept, and used again. A build of torch for GPUs takes several gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What compiles; and what asks transformers.
TORCH = [
    "tests/training/recipe/test_compiled.py",
    "tests/training/recipe/test_loss.py",
    "tests/model/test_byhand.py",
    "tests/training/recipe/test_health.py",
]
FILES = {
    "torch": TORCH,
    "transformers": sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"transformers(_twin|\b)", path.read_text(encoding="utf-8"))
    ),
}


def install(package: str, version: str, folder: Path) -> Path:
    """The folder that holds this version, made where it is not there."""
    target = folder / f"{package}-{version}"
    if not target.exists():
        wanted = f"{package}=={version}" + ("" if version.count(".") == 2 else ".*")
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), wanted]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def main() -> int:
    """Print a line a version; 1 where a test failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=FILES)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--folder", type=Path, help="where the versions are installed and kept; else thrown away")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for version in arguments.versions:
            target = install(arguments.package, version, (arguments.folder or Path(temporary)).resolve())
            environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}"}
            ask = f"import {arguments.package} as package; print(package.__version__)"
            run = [sys.executable, "-W", "ignore"]
            found = subprocess.run([*run, "-c", ask], env=environment, capture_output=True, text=True, check=True)
            began = time.monotonic()
            tests = subprocess.run(
                [*run, "-m", "pytest", "-n", "2", *FILES[arguments.package]],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            lines = [line for line in tests.stdout.splitlines() if re.search(r"\d (passed|failed|error)", line)]
            summary = lines[-1].strip("= ") if lines else tests.stderr.strip()
            print(
                f"{arguments.package} {found.stdout.strip():16} {summary}  ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            if tests.returncode:
                failed = True
                print("\n".join(line for line in tests.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
