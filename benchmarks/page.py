"""The page that benchmarks write their tables into, each between marks of its own."""

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def marks(name: str) -> tuple[str, str]:
    """Where a section begins and where it ends."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def page_with(name: str, section: str) -> str:
    """The page with a section between its marks.

    Raises:
        ValueError: The page has not these marks.
    """
    begin, end = marks(name)
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def put(name: str, section: str) -> None:
    """Writes the page with this section."""
    PAGE.write_text(page_with(name, section), encoding="utf-8")
