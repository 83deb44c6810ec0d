"""Every case has a test or a reason, and the page says what the tests are."""

from tests.reliability.catalogue import ABSENT, CASES, PAGE, page, shown_by


def test_every_case_has_a_test_or_a_reason() -> None:
    tested = {name for name, tests in shown_by().items() if tests}
    assert tested | ABSENT.keys() == CASES.keys()


def test_the_page_is_made_from_the_tests() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith("<!-- table -->\n" + page())
