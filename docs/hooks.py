"""MkDocs hooks that turn references into links where the plugins do not."""

import re
from typing import Any

from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROLE = re.compile(r':(?:attr|class|data|exc|func|meth|mod):<code>~?(.*?)</code>')
NOTEBOOK_LINK = re.compile(r'href="([\w/-]+\.md)(#[\w-]+)?"')


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Link the roles in docstrings and the pages that a notebook names.

    mkdocstrings renders docstrings as Markdown, which has no roles such as ``:func:`NAME```;
    mkdocs-jupyter leaves links to Markdown files as they are.
    """
    html = ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
    if page.file.src_uri.endswith('.ipynb'):
        html = NOTEBOOK_LINK.sub(
            lambda match: f'href="{files.src_uris[match[1]].url_relative_to(page.file)}'
                          f'{match[2] or ""}"', html)
    return html
