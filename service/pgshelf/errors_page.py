"""docs/errors.md for browsers, as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Problems of pgshelf</title>
<style>body {{ font: 1rem/1.5 sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem }}
:target {{ background: #ffc }}</style>
</head>
<body>
{}
</body>
</html>
"""


def page(markdown: str) -> str:
    """The page; a section has its heading as id, for the `type` of a problem. The other files are not served."""
    parser = MarkdownIt("commonmark", {"html": False})
    tokens = parser.parse(markdown)
    for opening, inside in pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h2":
            opening.attrSet("id", inside.content)
        if inside.children:
            inside.children = list(_unlinked(inside.children))
    return PAGE.format(parser.renderer.render(tokens, parser.options, {}))


def _unlinked(tokens: list[Token]) -> Iterator[Token]:
    """Links to other files as their text and where it stands."""
    file = ""
    for token in tokens:
        if token.type == "link_open":
            file = str(token.attrGet("href")).partition("#")[0]
        elif token.type == "link_close":
            yield Token("text", "", 0, content=f" in docs/{file}")
        else:
            yield token
