"""docs/performance.md says what the committed results say."""

import json

from benchmarks import tick_tax


def test_the_section_on_ticks_is_made_of_the_results() -> None:
    document = json.loads(tick_tax.RESULTS.read_text(encoding="utf-8"))
    assert document["shapes"].keys() == tick_tax.SHAPES.keys()
    assert tick_tax.page_with(document) == tick_tax.PAGE.read_text(encoding="utf-8")
