"""Build ``openrlhf==0.11.2+cpu``: the wheel from the package index with our patch.

    python patches/build_wheel.py OUTPUT_FOLDER [RELEASE]

Downloads the wheel with pip, checks its SHA-256, applies ``openrlhf-0.11.2/run-without-cuda.patch`` with ``git apply``
(which applies all hunks or none) and packs the result with a local version, so that ``pip list`` distinguishes the two.
Both wheels are written to OUTPUT_FOLDER. The patch applies to every RELEASE below; the contract tests run against all.
Needs ``git`` and the package ``wheel``.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PATCHED = "0.11.2"
SHA256 = {
    "0.11.0": "b1d78d979cfc3a8241f1a7b2f6308bb19b061ae748528f20443df046e8d181cf",
    "0.11.1": "21dc11ecb666bfff7c296cbe77bd5f961b3cfe02b536c81bf9da018592f8aeee",
    "0.11.2": "c969d70db03a70724c3d8a5a01186c6e0728bce624fb3dff95e39b5396acefa6",
}
# OpenRLHF requires these two unconditionally; both are CUDA extensions that its CPU code paths do not call.
CUDA_ONLY = ("flash-attn", "bitsandbytes")
PATCH = Path(__file__).parent.resolve() / f"openrlhf-{PATCHED}" / "run-without-cuda.patch"


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def build(output: Path, release: str) -> None:
    python = sys.executable
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, f"openrlhf=={release}")
        (wheel,) = work.glob("openrlhf-*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != SHA256[release]:
            raise SystemExit(f"{wheel.name}: SHA-256 must be {SHA256[release]}, found {digest}")

        run(python, "-m", "wheel", "unpack", "--dest", work, wheel)
        tree = work / f"openrlhf-{release}"
        run("git", "apply", "-p1", PATCH, cwd=tree / f"openrlhf-{release}.data" / "purelib")

        for kind in ("data", "dist-info"):
            (tree / f"openrlhf-{release}.{kind}").rename(tree / f"openrlhf-{release}+cpu.{kind}")
        metadata = tree / f"openrlhf-{release}+cpu.dist-info" / "METADATA"
        lines = metadata.read_text().splitlines(keepends=True)
        lines = [line for line in lines if not line.startswith(tuple(f"Requires-Dist: {name}" for name in CUDA_ONLY))]
        metadata.write_text("".join(lines).replace(f"Version: {release}\n", f"Version: {release}+cpu\n", 1))

        run(python, "-m", "wheel", "pack", "--dest-dir", output, tree)
        shutil.copy(wheel, output)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], *([release] for release in SHA256)):
        raise SystemExit(__doc__)
    build(Path(sys.argv[1]), *(sys.argv[2:] or [PATCHED]))
