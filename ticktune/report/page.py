"""The report of a run: one HTML page, no script, nothing loaded; every value from outside is escaped."""

from collections.abc import Iterable, Sequence
from typing import Any

from ticktune.console import duration
from ticktune.report.chart import Line, Points, line_chart, smooth
from ticktune.report.markup import DASH, Markup, count_text, escape, escape_lines, figure_text, finite

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2129; --soft: #5b6673;
  --line: #e2e6eb; --tint: #eef4fb; --blue: #1f5fa8; --pale: #a9c4e2; --amber: #b45309; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #13161a; --card: #1b1f25; --ink: #e4e8ed;
  --soft: #9aa5b1; --line: #2e343c; --tint: #1f2a37; --blue: #7db4f0; --pale: #4d76a3; --amber: #f0a94e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 56px; }
h1 { font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 17px; font-weight: 650; margin: 36px 0 12px; }
h1, p, dd, td { overflow-wrap: anywhere; }
p { margin: 0; } .soft, dt, figcaption, thead th { color: var(--soft); }
.eyebrow { font-size: 13px; font-weight: 600; color: var(--blue); margin-bottom: 6px; }
.lead { font-size: 18px; margin-top: 20px; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; }
.card { overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1px;
  background: var(--line); margin-top: 20px; overflow: hidden; }
.facts div { background: var(--card); padding: 12px 16px; }
dt { font-size: 13px; } dd { margin: 0; font-size: 18px; font-weight: 600; line-height: 1.35; }
dd small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px; text-align: right; border-top: 1px solid var(--line); font-weight: 400; }
thead th { border-top: 0; font-size: 13px; } th:first-child, .words td { text-align: left; }
tbody th { white-space: nowrap; } .words th { width: 34%; color: var(--soft); }
.chosen > * { background: var(--tint); font-weight: 600; }
figure { padding: 14px 12px 8px; break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; font-size: 13px;
  padding: 0 4px 6px; } figcaption b { color: var(--ink); font-size: 15px; margin-right: auto; }
.key { white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 16px; border-top: 3px solid; margin-right: 5px;
  vertical-align: middle; }
.key.raw::before { color: var(--pale); } .key.main::before { color: var(--blue); }
.key.other::before { color: var(--amber); }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; fill: var(--soft); }
svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
polyline.raw { stroke: var(--pale); stroke-width: 1; } polyline.main { stroke: var(--blue); stroke-width: 2; }
polyline.other { stroke: var(--amber); stroke-width: 2; }
circle.main { fill: var(--blue); } circle.other { fill: var(--amber); } circle.raw { fill: var(--pale); }
svg .mark { stroke: var(--amber); stroke-dasharray: 3 3; } svg .ring { fill: none; stroke: var(--amber);
  stroke-width: 2; } svg .note { fill: var(--amber); font-weight: 600; }
pre, code { font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; padding: 14px 16px; tab-size: 4; } .empty { padding: 14px 16px; color: var(--soft); }
figure .empty { padding: 6px 4px; } .words tr:first-child > * { border-top: 0; }
@media (max-width: 880px) { .facts { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 520px) { main { padding: 24px 12px; } th, td { padding: 6px 10px; } h1 { font-size: 24px; }
  .facts { grid-template-columns: 1fr 1fr; } }
@media print { * { print-color-adjust: exact; } figcaption { gap: 0 8px; font-size: 8pt; }
  .key::before { width: 9px; }
  body { background: #fff; font-size: 10.5pt; } main { max-width: none; padding: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 9pt; } .card { overflow: visible; }
  .grid { grid-template-columns: 1fr 1fr; } .facts { grid-template-columns: repeat(6, 1fr); }
  tr, .facts { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def report_page(record: dict[str, Any], entries: list[dict[str, Any]], recipe: str) -> str:
    """Returns the report of a run as a whole HTML document.

    Args:
        record: What ``run.json`` holds; whatever is missing or not finite is shown as a dash.
        entries: The lines of ``metrics.jsonl``: logged steps and evaluations.
        recipe: The text of ``recipe.yaml``.
    """
    task = escape(_part(record, "recipe").get("task"))
    base = escape(_part(record, "base").get("name"))
    evaluations = [entry for entry in entries if isinstance(entry.get("metrics"), dict)]
    body = [
        f'<header><p class="eyebrow">ticktune run</p><h1>{task}</h1><p class="soft">on {base}</p></header>',
        _lead(record),
        _facts(record),
        _section("Validation, before and after", _before_after(record)),
        _section("Curves", _curves(record, entries, evaluations)),
        _section("Evaluations", _evaluation_table(record, evaluations)),
        _section("Environment and inputs", _environment(record)),
        _section("Recipe, every default spelled out", f'<pre class="card">{escape_lines(recipe)}</pre>'),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{task} on {base}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _empty(text: str) -> str:
    return f'<p class="card empty">{text}</p>'


def _table(head: Sequence[object], rows: Iterable[Sequence[object]], *, chosen: object = None) -> str:
    """A table; the first cell of a row is its heading, and the row headed ``chosen`` stands out."""
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        mark = ' class="chosen"' if chosen is not None and first == chosen else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{cells}</tr>')
    opening = f"<table>\n<thead><tr>{titles}</tr></thead>" if head else '<table class="words">'
    return f'<div class="card">{opening}\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table></div>"


def _share(record: dict[str, Any]) -> float | None:
    trained, base = finite(record.get("trained_parameters")), finite(record.get("base_parameters"))
    return None if trained is None or base is None or trained + base <= 0 else trained / (trained + base)


def _lead(record: dict[str, Any]) -> str:
    metric, share = str(record.get("metric") or "metric"), _share(record)
    before = finite(_part(record, "base_metrics").get(metric))
    after = finite(_part(record, "metrics").get(metric))
    trained = "" if share is None else f", with {100 * share:.2f} % of the parameters trained"
    if before is None or after is None:
        return ""
    return (
        f'<p class="lead">Validation {escape(metric)} went from {figure_text(before)} to '
        f"<strong>{figure_text(after)}</strong>{trained}.</p>"
    )


def _facts(record: dict[str, Any]) -> str:
    compute, share = _part(record, "compute"), _share(record)
    skipped = finite(record.get("skipped_steps"))
    seconds, speed = finite(record.get("training_seconds")), finite(record.get("rows_per_second"))
    items = [
        ("Steps", count_text(record.get("steps")), f"{skipped:.0f} skipped" if skipped else "none skipped"),
        ("Chosen step", count_text(record.get("chosen_step")), _choice(record)),
        (
            "Trained",
            count_text(record.get("trained_parameters")),
            DASH if share is None else f"{100 * share:.2f} % of all parameters",
        ),
        (
            "Training time",
            DASH if seconds is None else duration(seconds),
            "" if seconds is None else f"{seconds:,.1f} s in steps",
        ),
        ("Speed", DASH if speed is None else f"{speed:,.1f}", "rows/s"),
        ("Device", compute.get("name"), f"{compute.get('device', DASH)}, {compute.get('precision', DASH)}"),
    ]
    cells = (f"<div><dt>{n}</dt><dd>{escape(v)}<small>{escape(s)}</small></dd></div>" for n, v, s in items)
    return '<dl class="card facts">\n' + "\n".join(cells) + "\n</dl>"


def _choice(record: dict[str, Any]) -> str:
    metric, save = record.get("metric"), _part(record, "recipe").get("evaluation.save")
    return f"best {metric}" if save == "best" and metric in _part(record, "metrics") else "the last"


def _before_after(record: dict[str, Any]) -> str:
    before, after = _part(record, "base_metrics"), _part(record, "metrics")
    rows = []
    for name in dict.fromkeys([*after, *before]):
        then, now = finite(before.get(name)), finite(after.get(name))
        change = DASH if then is None or now is None else ("+" if now > then else "") + figure_text(now - then)
        rows.append((name, figure_text(then), figure_text(now), change))
    if not rows:
        return _empty("There are no validation metrics.")
    return _table(("metric", "before", "after", "change"), rows, chosen=record.get("metric"))


def _evaluation_table(record: dict[str, Any], evaluations: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in evaluations for name in entry["metrics"]))
    if not names:
        return _empty("There was no evaluation.")
    rows = [
        (count_text(entry.get("step")), *(figure_text(entry["metrics"].get(name)) for name in names))
        for entry in evaluations
    ]
    return _table(("step", *names), rows, chosen=count_text(record.get("chosen_step")))


def _environment(record: dict[str, Any]) -> str:
    compute, hashes = _part(record, "compute"), _part(record, "hashes")
    recipe = _part(record, "recipe")
    machine = [
        ("device", f"{compute.get('name', DASH)} ({compute.get('device', DASH)})"),
        ("precision", f"{compute.get('precision', DASH)}, base held as {compute.get('base_dtype', DASH)}"),
        ("threads", count_text(compute.get("threads"))),
        *_part(record, "versions").items(),
    ]
    inputs = [
        ("status", record.get("status")),
        ("started", str(record.get("started_at") or "").replace("T", " ")),
        ("finished", str(record.get("finished_at") or "").replace("T", " ")),
        ("seed", recipe.get("training.seed")),
        *((f"{name} rows", count_text(number)) for name, number in _part(record, "rows").items()),
        ("base commit", _hash(_part(record, "base").get("commit"))),
        ("base files", _hash(hashes.get("base"))),
        ("tokenizer", _hash(hashes.get("tokenizer"))),
        *((f"{name} data", _hash(value)) for name, value in _part(hashes, "data").items()),
    ]
    return f'<div class="grid">{_table((), machine)}{_table((), inputs)}</div>'


def _hash(value: object) -> object:
    if not isinstance(value, str) or len(value) <= 12:
        return value
    return Markup(f'<code title="{escape(value)}">{escape(value[:12])}\u2026</code>')


def _curves(record: dict[str, Any], entries: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    metric = str(record.get("metric") or "metric")
    loss = _points(entries, "loss")
    scores = [{"step": e.get("step"), **e["metrics"]} for e in evaluations]
    end = max((x for x, _ in [*loss, *_points(scores, metric), *_points(scores, "loss")]), default=0.0)
    charts = [
        line_chart(
            "Training loss",
            "loss",
            [
                Line(loss, "raw", "logged"),
                Line(smooth(loss), "main", "smoothed"),
                Line(_points(scores, "loss"), "other", "validation", has_dots=True),
            ],
            end,
        ),
        line_chart(
            f"Validation {metric}",
            metric,
            [Line(_points(scores, metric), "main", has_dots=True)],
            end,
            chosen=finite(record.get("chosen_step")),
        ),
        line_chart("Learning rate", "lr", [Line(_points(entries, "lr"), "main")], end),
        line_chart("Gradient norm", "norm before clipping", [Line(_points(entries, "grad_norm"), "main")], end),
    ]
    return f'<div class="grid">{"".join(charts)}</div>'


def _points(entries: list[dict[str, Any]], key: str) -> Points:
    pairs = ((finite(entry.get("step")), finite(entry.get(key))) for entry in entries)
    return sorted(((x, y) for x, y in pairs if x is not None and y is not None), key=lambda point: point[0])
