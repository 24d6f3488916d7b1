"""Markdown tables."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table; the first row holds the column headings."""
    lines = [f'| {" | ".join(row)} |' for row in rows]
    lines.insert(1, '|---' * len(rows[0]) + '|')
    return '\n'.join(lines)
