"""The report as one self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from pama_plugin.runs.report.tables import Grid, is_text
from pama_plugin.runs.report.texts import Exchange

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td { white-space: nowrap } th { vertical-align: bottom } .text { text-align: left }
.note, figcaption { color: #666; font-size: 13px; max-width: 45rem; margin: .4rem 0 } h2 { break-after: avoid }
figure { margin: 1.5rem 0 } img { width: 100%; min-width: 45rem } .bad { color: #a40 } .wide { overflow-x: auto }
.texts { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; margin: 1rem 0 } .texts > div { flex: 1 1 17rem }
.texts p, .texts pre { margin: 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }
.texts > p { flex-basis: 100% } .texts p, .texts small { color: #666 }
@media print {
  body { margin: 0; max-width: none } figure, .texts { break-inside: avoid } img { min-width: 0 }
  .wide { overflow: visible } table { font-size: 11px } th, td { padding: .1rem .35rem } td { white-space: normal }
}
</style>
<h1>{{ title }}</h1>
{% if alarms %}<h2>Alarms</h2><ul class="bad">{% for line in alarms %}<li>{{ line }}{% endfor %}</ul>{% endif %}
{% if missing %}<h2>Missing</h2><ul class="bad">{% for line in missing %}<li>{{ line }}{% endfor %}</ul>{% endif %}
{% if front %}<h2>The front</h2><p>{{ front }}</p>{% endif %}
{% for grid in grids %}<h2>{{ grid.title }}</h2>
<div class="wide"><table>
<tr>{% for name in grid.columns %}<th{{ left(grid, loop.index0) }}>{{ name }}{% endfor %}</tr>
{% for row in grid.rows %}<tr>{% for cell in row %}<td{{ left(grid, loop.index0) }}>{{ cell }}{% endfor %}</tr>
{% endfor %}</table></div>{% if grid.caption %}<p class="note">{{ grid.caption }}</p>{% endif %}
{% endfor %}
{% for name, data in pictures %}<figure><div class="wide">
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></div>
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
    page.globals["left"] = lambda grid, column: Markup(' class="text"' if is_text(grid, column) else "")
    content = page.render(
        title=title, grids=grids, pictures=encoded, missing=missing, alarms=alarms, front=front, texts=texts
    )
    file.write_text(content, encoding="utf-8")
