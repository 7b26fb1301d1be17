"""Files that are a document each: plain text, Markdown, HTML, reStructuredText; single ones, or all of a folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from pgshelf.transfer import LINE_BYTES, FileError, Rejected, Row, row

SUFFIXES = (".txt", ".md", ".html", ".rst")
# What looks like a heading and is none: the settings above a Markdown page, and code.
ASIDE = re.compile(r"\A---\n.*?^---$|^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
HEADINGS = {
    ".md": re.compile(r"^ {0,3}#{1,6}[ \t]+(?P<title>.+)$|^(?P<under>\S.*)\n {0,3}(?:=+|-+)[ \t]*$", re.MULTILINE),
    ".rst": re.compile(r"^(?P<title>\S.*)\n(?P<under>[=\-~^\"'#*+`:.])(?P=under){2,}[ \t]*$", re.MULTILINE),
}
LINES = {"br", "li", "tr", "dt", "dd"}
BLOCKS = {
    "p", "div", "section", "article", "header", "footer", "main", "nav", "aside", "ul", "ol", "dl", "table", "pre",
    "blockquote", "figure", "hr",
}  # fmt: skip
UNSEEN = {"script", "style", "template"}


class Texts:
    """One such file, or those below a folder in the order of their paths; `done` of `total` files are read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._root = Path(name)
        self._files = [self._root]
        if self._root.is_dir():
            self._files = sorted(path for path in self._root.rglob("*") if _is_text(path.relative_to(self._root), path))
            if not self._files:
                raise FileError(f"{name}: holds no file that ends in {', '.join(SUFFIXES)}")
        self.done, self.total = 0, len(self._files)

    def fingerprint(self) -> str:
        """Stays while the files do: of their places, sizes and times."""
        try:
            told = [(self._key(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        except OSError as error:
            raise FileError(f"{error.filename}: {error.strerror}") from None
        said = [str(self._root.resolve()), *told]
        return hashlib.sha256(repr(said).encode(errors="surrogateescape")).hexdigest()

    def items(self) -> Iterator[Row | Rejected]:
        """A document for each file, and the files that are none."""
        for place, path in enumerate(self._files, 1):
            try:
                found = self._document(place, path)
            except (OSError, ValueError) as error:
                reason = (
                    "is not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
                )
                found = Rejected(place, f"{self._key(path)}: {reason}")
            self.done = place
            yield found

    def _document(self, place: int, path: Path) -> Row | Rejected:
        if path.stat().st_size > LINE_BYTES:
            raise ValueError(f"has more than {LINE_BYTES} bytes")
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        suffix, title = path.suffix.lower(), None
        if suffix == ".html":
            page = Page()
            page.feed(text)
            page.close()
            text, title = page.text, page.title
        elif suffix in HEADINGS:
            title = heading(text, suffix)
        key, source = self._key(path), str(path)
        (key + source).encode()
        return row(place, [("key", key), ("source", source), ("title", (title or path.name)[:200]), ("text", text)])

    def _key(self, path: Path) -> str:
        return path.name if path == self._root else path.relative_to(self._root).as_posix()


def is_texts(name: str) -> bool:
    """Whether a name is a folder's, or that of one of these files."""
    path = Path(name)
    return path.suffix.lower() in SUFFIXES or path.is_dir()


def _is_text(relative: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def heading(text: str, suffix: str) -> str | None:
    """The first heading of a Markdown or reStructuredText file."""
    found = HEADINGS[suffix].search(ASIDE.sub("", text) if suffix == ".md" else text)
    if found is None:
        return None
    return re.sub(r"(?:^|\s)#+$", "", (found["title"] or found["under"]).strip()).strip()


class Page(HTMLParser):
    """What a reader sees of an HTML page, its headings as Markdown's; `title` is its own, else its first heading."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._title: list[str] = []
        self._open: list[str] = []  # of the tags that decide what text is

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a heading, a block, a line, or what is not seen."""
        if re.fullmatch("h[1-6]", tag):
            self._parts.append(f"\n\n{'#' * int(tag[1])} ")
        elif tag in BLOCKS:
            self._parts.append("\n\n")
        elif tag in LINES:
            self._parts.append("\n")
        if tag in UNSEEN or tag in ("title", "pre"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag in BLOCKS or re.fullmatch("h[1-6]", tag):
            self._parts.append("\n\n")
        if tag in self._open:
            del self._open[self._open.index(tag) :]

    def handle_data(self, data: str) -> None:
        """Text, or the title of the page."""
        within = self._open[-1] if self._open else None
        if within == "title":
            self._title.append(data)
        elif within == "pre":
            self._parts.append(data)
        elif within is None:
            said = re.sub(r"\s+", " ", data)
            before = self._parts[-1][-1:] if self._parts else "\n"
            if said := said.lstrip() if before.isspace() else said:
                self._parts.append(said)

    @property
    def text(self) -> str:
        """All that is seen."""
        return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(self._parts)).strip()

    @property
    def title(self) -> str | None:
        """None where the page has neither."""
        return " ".join("".join(self._title).split()) or heading(self.text, ".md")
