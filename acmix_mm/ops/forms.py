"""Naming and choosing the forms of an operator."""

from collections.abc import Mapping
from typing import Callable, Optional


def named_form(operator: str, forms: Mapping[str, Callable], form: Optional[str],
               default: str) -> Callable:
    """Return the form of ``operator`` called ``form``, or ``default`` where it is None.

    Raises:
        ValueError: ``form`` is not one of ``forms``.
    """
    chosen = default if form is None else form
    if chosen not in forms:
        raise ValueError(f'{operator} has no form {chosen!r}; it has {", ".join(sorted(forms))}.')
    return forms[chosen]
