"""Markdown tables."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table; the first row is the header."""
    header, *body = [f'| {" | ".join(row)} |' for row in rows]
    return '\n'.join([header, '|' + '---|' * len(rows[0]), *body])
