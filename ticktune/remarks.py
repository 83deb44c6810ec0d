"""What is said of rows on their way into examples: left out, odd, cut, unknown."""

from ticktune.console import Console
from ticktune.data.audit import Counts
from ticktune.data.encode import Encoded
from ticktune.data.read import Rows
from ticktune.tasks.task import Task


def say_bad_rows(rows: Rows, name: str, console: Console) -> None:
    """Warns of rows that were left out because they cannot be used."""
    if rows.bad:
        count, total = len(rows.bad), len(rows.bad) + len(rows)
        found = "; ".join(f"{problem.where}: {problem.message}" for problem in rows.bad[:3])
        console.warn(f"{name}: {count} of {total} rows ({100 * count / total:.1f} %) cannot be used, left out: {found}")


def say_counts(counts: Counts, name: str, rows: int, console: Console) -> None:
    """Warns of what :func:`ticktune.data.audit.audit` counted in a split of so many rows."""

    def share(count: int) -> str:
        return f"{count} of the {rows} {name} rows ({100 * count / rows:.1f} %)"

    if counts.get("training"):
        console.warn(f"{share(counts['training'])} are training rows too")
    if counts["contradicted"]:
        console.warn(f"{share(counts['contradicted'])} have the same input as a row with another label")
    if counts["control"]:
        console.warn(f"{share(counts['control'])} hold a text that the tokenizer reads as a control token")
    if counts["repeated"]:
        console.note(f"{share(counts['repeated'])} repeat an earlier row")


def say_report(examples: Encoded, name: str, task: Task, console: Console) -> None:
    """Warns of what was cut, left out or unknown on the way from rows to examples.

    Args:
        examples: Of the rows.
        name: Of the split or file.
        task: The task, which says what examples are cut to.
        console: Where to print.
    """
    report, count = examples.report, len(examples.source)
    if report.truncated:
        share = 100 * len(report.truncated) / count
        places = ", ".join(examples.source.where(i) for i in report.truncated[:3])
        lost = f" and lost {task.cut}" if task.cut else " and were cut"
        cut = f", {report.cut_ends} of them at the end of what is learned" if report.cut_ends else ""
        console.warn(
            f"{name}: {len(report.truncated)} of {count} rows ({share:.1f} %) are longer than "
            f"{task.limit()}{lost}{cut}: {places}"
        )
    if report.unsupervised:
        places = ", ".join(examples.source.where(i) for i in report.unsupervised[:3])
        share = 100 * len(report.unsupervised) / count
        because = f"({report.why})" if report.why else f"after cutting to {task.limit()}"
        console.warn(
            f"{name}: {len(report.unsupervised)} of {count} rows ({share:.1f} %) have nothing to learn from {because} "
            f"and were left out: {places}"
        )
    if report.unknown:
        total = sum(report.unknown.values())
        frequent = sorted(report.unknown, key=lambda item: -report.unknown[item])
        console.warn(
            f"{name}: {total} of {report.items} items ({100 * total / report.items:.1f} %) are unknown to the base, "
            f"{len(frequent)} different ones: {', '.join(frequent[:5])}{', ...' if len(frequent) > 5 else ''}"
        )
