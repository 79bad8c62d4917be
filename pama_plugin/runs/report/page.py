"""The report as one self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from pama_plugin.runs.report.tables import Grid
from pama_plugin.runs.report.texts import Exchange

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
caption, figcaption { caption-side: bottom; text-align: left; color: #666; font-size: 13px; padding-top: .4rem }
img { max-width: 100% } figure { margin: 1.5rem 0 } .bad { color: #a40 } .wide { overflow-x: auto }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .4rem 1.5rem; margin: 1rem 0 }
.texts p, .texts pre { margin: 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }
.texts > p { grid-column: 1 / -1 } .texts p, .texts small { color: #666 }
@media print { body { margin: 0; max-width: none } figure, .texts { break-inside: avoid } }
</style>
<h1>{{ title }}</h1>
{% if alarms %}<h2>Alarms</h2><ul class="bad">{% for line in alarms %}<li>{{ line }}{% endfor %}</ul>{% endif %}
{% if missing %}<h2>Missing</h2><ul class="bad">{% for line in missing %}<li>{{ line }}{% endfor %}</ul>{% endif %}
{% if front %}<h2>The front</h2><p>{{ front }}</p>{% endif %}
{% for grid in grids %}<h2>{{ grid.title }}</h2>
<div class="wide"><table><tr>{% for name in grid.columns %}<th>{{ name }}{% endfor %}</tr>
{% for row in grid.rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}<caption>{{ grid.caption }}</caption></table></div>
{% endfor %}
{% for name, data in pictures %}<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}
{% for heading, exchanges in texts %}<h2>{{ heading }}</h2>
{% for exchange in exchanges %}<div class="texts"><p>{{ exchange.prompt }}</p>
{% for answer in exchange.answers %}<div><small>{{ answer.heading }}</small><pre>{{ answer.text }}</pre>
<small>{{ answer.rewards }}</small></div>
{% endfor %}</div>
{% endfor %}{% endfor %}</html>
"""


def write_page(
    file: Path,
    title: str,
    grids: Sequence[Grid],
    pictures: Sequence[Path],
    missing: Sequence[str],
    alarms: Sequence[str] = (),
    front: str = "",
    texts: Sequence[tuple[str, Sequence[Exchange]]] = (),
) -> None:
    """Write tables, PNG files, alarms and texts to one HTML file, with the pictures embedded.

    Args:
        front: whether the run arrived at the front.
        texts: headings, and the prompts and responses below them.
    """
    encoded = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in pictures]
    page = Environment(autoescape=True).from_string(PAGE)
    content = page.render(
        title=title, grids=grids, pictures=encoded, missing=missing, alarms=alarms, front=front, texts=texts
    )
    file.write_text(content, encoding="utf-8")
