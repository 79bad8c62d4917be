"""Build ``openrlhf==0.11.2+cpu``: the pristine wheel from the package index, plus our patch.

    python patches/build_wheel.py OUTPUT_FOLDER

Downloads the wheel with pip, checks its SHA-256, applies ``openrlhf-0.11.2/run-without-cuda.patch`` with ``git apply``
(which refuses to apply a hunk in part) and packs the result under a local version, so that ``pip list`` tells the two
apart. Needs ``git`` and the package ``wheel``.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASE = "0.11.2"
SHA256 = "c969d70db03a70724c3d8a5a01186c6e0728bce624fb3dff95e39b5396acefa6"
# The host requires these two unconditionally; both are CUDA extensions that its CPU code paths never call.
CUDA_ONLY = ("flash-attn", "bitsandbytes")
PATCH = Path(__file__).parent.resolve() / f"openrlhf-{RELEASE}" / "run-without-cuda.patch"


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def build(output: Path) -> None:
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, f"openrlhf=={RELEASE}")
        (wheel,) = work.glob("openrlhf-*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{wheel.name}: SHA-256 must be {SHA256}, found {found}: not the wheel this patch is for")

        run(python, "-m", "wheel", "unpack", "--dest", work, wheel)
        tree = work / f"openrlhf-{RELEASE}"
        run("git", "apply", "-p1", PATCH, cwd=tree / f"openrlhf-{RELEASE}.data" / "purelib")

        for kind in ("data", "dist-info"):
            (tree / f"openrlhf-{RELEASE}.{kind}").rename(tree / f"openrlhf-{RELEASE}+cpu.{kind}")
        metadata = tree / f"openrlhf-{RELEASE}+cpu.dist-info" / "METADATA"
        lines = metadata.read_text().splitlines(keepends=True)
        lines = [line for line in lines if not line.startswith(tuple(f"Requires-Dist: {name}" for name in CUDA_ONLY))]
        metadata.write_text("".join(lines).replace(f"Version: {RELEASE}\n", f"Version: {RELEASE}+cpu\n", 1))

        output.mkdir(parents=True, exist_ok=True)
        run(python, "-m", "wheel", "pack", "--dest-dir", output, tree)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    build(Path(sys.argv[1]))
