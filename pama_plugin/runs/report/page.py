"""The report as one self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from pama_plugin.runs.report.tables import Grid

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
caption, figcaption { caption-side: bottom; text-align: left; color: #666; font-size: 13px; padding-top: .4rem }
img { max-width: 100% } figure { margin: 1.5rem 0 } ul { color: #a40 }
</style>
<h1>{{ title }}</h1>
{% if missing %}<h2>Missing</h2><ul>{% for line in missing %}<li>{{ line }}{% endfor %}</ul>{% endif %}
{% for grid in grids %}<h2>{{ grid.title }}</h2>
<table><tr>{% for name in grid.columns %}<th>{{ name }}{% endfor %}</tr>
{% for row in grid.rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}<caption>{{ grid.caption }}</caption></table>
{% endfor %}
{% for name, data in pictures %}<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}</html>
"""


def write_page(file: Path, title: str, grids: Sequence[Grid], pictures: Sequence[Path], missing: Sequence[str]) -> None:
    """Write the tables and the PNG files to one HTML file, with the pictures embedded."""
    encoded = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in pictures]
    page = Environment(autoescape=True).from_string(PAGE)
    file.write_text(page.render(title=title, grids=grids, pictures=encoded, missing=missing), encoding="utf-8")
