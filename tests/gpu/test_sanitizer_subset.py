"""The calls of the sanitizer runs are right without a sanitizer."""

from .cases import Case, each
from .sanitizer_subset import CASES, run_case


@each(CASES)
def test_sanitizer_case(case: Case) -> None:
    run_case(case)
