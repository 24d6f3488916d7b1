"""Hooks of MkDocs: references in docstrings become links."""

import re
from typing import Any

ROLE = re.compile(r':(?:attr|class|data|func|meth|mod):<code>~?(.*?)</code>')


def on_page_content(html: str, **_: Any) -> str:
    """Link ``:func:`NAME``` to its entry of the API reference, where it has one.

    mkdocstrings renders docstrings as Markdown, which has no roles.
    """
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
