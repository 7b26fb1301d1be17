"""Text into chunks: structure first (headings, blocks, sentences, words), then size and overlap."""

from __future__ import annotations

import re
from collections.abc import Iterator

from semantic_text_splitter import MarkdownSplitter

# The splitter looks through all the rest of its input again for every chunk, so one long paragraph costs it quadratic
# time (two minutes for a megabyte). It is fed this many chunks' worth at a time, which makes the time linear.
WINDOW = 4

# Possessive, so that no input makes them go back and try again.
_SPACE = re.compile(r"\s*+")
_REST_OF_LINE = re.compile(r"[^\S\n]*+")
_HEADING = r"(?: {0,3}+#{1,6}(?:[ \t][^\n]*+)?+|[^\n]++\n {0,3}(?:=++|--++)[ \t\r]*+)(?:\n|\Z)"
_BEGINS_SECTION = re.compile(_HEADING)
_ONLY_HEADINGS = re.compile(rf"(?:\s*+{_HEADING})++\s*+\Z")
_SENTENCE = re.compile(r"[.!?][\"')\]]*\s+|[。！？]\s*|\n\s*")  # noqa: RUF001 - sentences of Chinese and Japanese end so
_WORD = re.compile(r"\s+")

Span = tuple[int, int]


def split(text: str, size: int, overlap: int = 0) -> list[str]:
    """Split plain text or Markdown into chunks of at most `size` characters, cut where its structure allows.

    A heading stays with what follows it. A chunk that does not begin a section repeats up to `overlap` characters of
    the chunk before it (never more than half of `size`), from the beginning of a sentence or word. Nothing but white
    space is dropped, so blank text gives no chunks. A megabyte takes about 10 ms, made to be hard about 2 s: use a
    thread. Raises ValueError for sizes that cannot be and for text that is no valid Unicode.
    """
    if size < 1:
        raise ValueError(f"chunk size must be at least 1, not {size}")
    if not 0 <= overlap < size:
        raise ValueError(f"chunk overlap must be at least 0 and smaller than the chunk size {size}, not {overlap}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is no valid Unicode: remove the lone surrogate at character {error.start}") from None
    overlap = min(overlap, size // 2)
    chunks: list[str] = []
    before = 0
    for start, end in _spans(text, size - overlap):
        first = _overlapping(text, before, start, end, overlap) if overlap and chunks else start
        chunks.append(text[first:end])
        before = start
    return chunks


def _spans(text: str, capacity: int) -> Iterator[Span]:
    """Where the chunks are, before overlap: in order, none overlapping, none blank."""
    splitter = MarkdownSplitter(capacity)
    position = 0
    while position < len(text):
        window = text[position : position + WINDOW * capacity]
        found = [(position + at, position + at + len(chunk)) for at, chunk in splitter.chunk_indices(window)]
        position += len(window)
        if position < len(text) and found and found[-1][0] > position - len(window):
            position = found.pop()[0]  # it may go on beyond the window: it begins the next one
        for start, end in found:
            whole = _with_body(text, start, end, capacity)
            if text[start:whole].strip():
                yield start, whole
            if whole > end:
                position = _after(_REST_OF_LINE, text, whole)
                break


def _with_body(text: str, start: int, end: int, capacity: int) -> int:
    """Where the chunk ends when a heading, or a scrap inside a section, takes along what fits of what follows it."""
    while end - start <= capacity // 2:
        body = _after(_SPACE, text, end)
        scrap = end - start < capacity // 8 and not _BEGINS_SECTION.match(text, body, body + capacity)
        room = capacity - (body - start)
        if body == len(text) or room < max(1, capacity // 4) or not (scrap or _ONLY_HEADINGS.match(text, start, end)):
            break
        at, piece = MarkdownSplitter(room).chunk_indices(text[body : body + 2 * room])[0]
        end = body + at + len(piece)
    return end


def _overlapping(text: str, before: int, start: int, end: int, overlap: int) -> int:
    """Where the chunk from `start` to `end` starts when it repeats the end of the chunk that started at `before`."""
    if _BEGINS_SECTION.match(text, start, end):
        return start
    first = max(before, start - overlap)
    if first == before:
        return first
    sentence = _SENTENCE.search(text, first - 1, start)
    if sentence and start - sentence.end() >= overlap // 2:
        return sentence.end()
    word = _WORD.search(text, first - 1, start)
    return word.end() if word else first


def _after(space: re.Pattern[str], text: str, position: int) -> int:
    found = space.match(text, position)
    return found.end() if found else position
