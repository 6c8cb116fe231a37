"""The calls of the sanitizer runs are right without a sanitizer."""

from . import sanitizer_gradients, sanitizer_subset
from .cases import Case, GradientCase, each


@each(sanitizer_subset.CASES)
def test_sanitizer_case(case: Case) -> None:
    sanitizer_subset.run_case(case)


@each(sanitizer_gradients.CASES)
def test_sanitizer_gradient_case(case: GradientCase) -> None:
    sanitizer_gradients.run_case(case)
