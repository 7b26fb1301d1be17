"""docs/errors.md for browsers: the part of Markdown that it is written in, as HTML."""

from __future__ import annotations

import html
import re

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
SPAN = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<strong>[^*]+)\*\*|\[(?P<text>[^]]+)\]\((?P<file>[^)#]+)[^)]*\)")


def page(markdown: str) -> str:
    """Headings, paragraphs, bold text and code; a section has its heading as id, for the `type` of a problem."""
    return PAGE.format("\n".join(_block(block) for block in re.split(r"\n{2,}", markdown.strip())))


def _block(block: str) -> str:
    marks, _, text = block.partition(" ")
    if marks == "#":
        return f"<h1>{_inline(text)}</h1>"
    if marks == "##":
        return f'<h2 id="{html.escape(text)}">{_inline(text)}</h2>'
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    return SPAN.sub(_span, html.escape(text))


def _span(found: re.Match[str]) -> str:
    # the other files are not served
    if found["file"]:
        return f"{found['text']} in docs/{found['file']}"
    return f"<code>{found['code']}</code>" if found["code"] else f"<strong>{found['strong']}</strong>"
