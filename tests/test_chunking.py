"""Chunks: nothing lost, never too large, cut where the structure allows, and quick for hostile input too."""

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgshelf.chunking import split

PARAGRAPH = "Alpha beta gamma delta. Epsilon zeta eta theta iota. Kappa lambda mu nu xi omicron pi."

markdown = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
        st.sampled_from(
            [
                "# Title\n",
                "\n## Sub\n\n",
                "Setext\n===\n",
                "\n\n",
                "\n",
                "- item\n",
                "  1. item\n",
                "> quote\n",
                "```\n",
                "    code\n",
                "| a | b |\n|---|---|\n",
                "***",
                "[a](b)",
                "<div>",
                "---\n",
                "\r\n",
                "\x1c",
                "\u2028",
                "漢字。",
                "word " * 30,
                "x" * 150,
                PARAGRAPH,
                "👨‍👩‍👧‍👦",
                "a\u0301" * 40,
                "[^1]: note\n",
                "[r]: http://x\n",
                "&amp;",
                "\\",
            ]
        ),
    ),
    max_size=40,
).map("".join)


def squashed(text):
    return "".join(text.split())


@settings(max_examples=400, deadline=None)
@given(markdown, st.integers(1, 200))
def test_nothing_is_lost_or_repeated_and_no_chunk_is_too_large_or_blank(text, size):
    chunks = split(text, size)
    assert squashed("".join(chunks)) == squashed(text)
    assert all(len(chunk) <= size and chunk.strip() and chunk in text for chunk in chunks)
    assert split(text, size) == chunks


@settings(max_examples=400, deadline=None)
@given(markdown, st.data())
def test_overlap_only_puts_the_end_of_the_chunk_before_in_front(text, data):
    size = data.draw(st.integers(2, 200))
    overlap = data.draw(st.integers(0, size // 2))
    bare, chunks = split(text, size - overlap), split(text, size, overlap)
    assert len(chunks) == len(bare)
    assert all(len(chunk) <= size and chunk.strip() and chunk in text for chunk in chunks)
    assert chunks[:1] == bare[:1]
    for (before, own), chunk in zip(itertools.pairwise(bare), chunks[1:], strict=True):
        assert chunk.endswith(own)
        repeated = squashed(chunk[: len(chunk) - len(own)])
        assert len(repeated) <= overlap
        assert squashed(before).endswith(repeated)


def test_a_text_that_fits_is_one_chunk_without_the_space_around_it():
    assert split("\n\n# Title\n\nOne paragraph.\n\n", 100) == ["# Title\n\nOne paragraph."]


@pytest.mark.parametrize("blank", ["", " ", "\n\t \u3000\n" * 5000, "\x1c"])
def test_blank_text_has_no_chunks(blank):
    assert split(blank, 50) == []


def test_sections_are_kept_apart_and_each_heading_goes_with_its_text():
    text = "".join(f"# Part {n}\n\n{PARAGRAPH}\n\n" for n in range(5))
    assert split(text, 110) == [f"# Part {n}\n\n{PARAGRAPH}" for n in range(5)]


def test_the_indentation_of_code_is_kept():
    assert split("    if ready:\n        go()", 50) == ["    if ready:\n        go()"]


def test_small_sections_share_a_chunk():
    text = "".join(f"## Part {n}\n\nShort.\n\n" for n in range(4))
    assert split(text, 50) == [
        "## Part 0\n\nShort.\n\n## Part 1\n\nShort.",
        "## Part 2\n\nShort.\n\n## Part 3\n\nShort.",
    ]


@pytest.mark.parametrize("heading", ["# Title", "# Book\n\n## Chapter\n### Section", "Title\n=====", "Title\r\n-----"])
@pytest.mark.parametrize(
    "body", ["word " * 100, PARAGRAPH * 5, "\n".join(f"- item {n} of this list" for n in range(40))]
)
def test_no_heading_stands_alone_before_a_section_that_is_too_large(heading, body):
    for before in ("", "An introduction that ends here.\n\n"):
        chunks = split(f"{before}{heading}\n\n{body}", 120)
        (first,) = (chunk for chunk in chunks if heading in chunk)
        assert first.startswith(heading)
        assert len(first) > len(heading) + 40


def test_a_fence_or_a_scrap_takes_along_what_follows_it():
    code = "```python\n" + "\n".join(f"value_{n} = compute({n})" for n in range(60)) + "\n```\n\n"
    chunks = split(f"## Use\n\nCall it so:\n\n{code}Then look at the result. {PARAGRAPH}\n\n{code}", 300)
    assert all(len(chunk) > 40 for chunk in chunks[:-1])
    assert chunks[0].startswith("## Use\n\nCall it so:\n\n```python\nvalue_0 = compute(0)\n")


def test_a_small_section_is_not_filled_up_with_the_beginning_of_the_next():
    chunks = split(f"# License\n\nMIT\n\n# History\n\n{PARAGRAPH * 3}", 200)
    assert chunks[0] == "# License\n\nMIT"
    assert chunks[1].startswith("# History\n\nAlpha")


def test_paragraphs_are_cut_between_sentences_and_sentences_between_words():
    assert split(PARAGRAPH, 60) == [PARAGRAPH[:52], PARAGRAPH[53:]]
    assert split("one two three four", 9) == ["one two", "three", "four"]
    assert split("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_characters_that_belong_together_stay_together():
    family = "👨‍👩‍👧‍👦"
    assert split(family * 4, len(family) * 2) == [family * 2, family * 2]


def test_overlap_begins_with_a_sentence_or_else_with_a_word():
    sentences = split(" ".join(f"This is sentence {n}." for n in range(10, 30)), 110, 25)
    assert all(chunk.startswith("This is sentence") for chunk in sentences)
    assert re.findall(r"\d+", sentences[0])[-1] == re.findall(r"\d+", sentences[1])[0]
    words = split(" ".join(f"word{n}" for n in range(100, 200)), 80, 20)
    assert all(re.fullmatch(r"word\d+( word\d+)*", chunk) for chunk in words)
    assert all(set(a.split()) & set(b.split()) for a, b in itertools.pairwise(words))


def test_overlap_works_without_spaces_too():
    letters = "".join(chr(0x4E00 + n) for n in range(200))
    chunks = split(letters, 50, 10)
    assert all(a[-10:] == b[:10] for a, b in itertools.pairwise(chunks))


def test_a_section_repeats_nothing_of_the_section_before_it():
    text = "".join(f"# Part {n}\n\n{PARAGRAPH}\n\n" for n in range(5))
    assert split(text, 150, 40) == [f"# Part {n}\n\n{PARAGRAPH}" for n in range(5)]


def test_an_overlap_of_nearly_the_whole_size_is_held_to_half_of_it():
    text = "word " * 1000
    assert split(text, 100, 99) == split(text, 100, 50)


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        (0, 0, "chunk size must be at least 1, not 0"),
        (-5, 0, "chunk size must be at least 1"),
        (100, 100, "smaller than the chunk size 100, not 100"),
        (100, -1, "at least 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, overlap, message):
    with pytest.raises(ValueError, match=message):
        split("text", size, overlap)


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        split("ab\ud800cd", 50)


HOSTILE = {
    "one line": "word " * 200_000,
    "one paragraph of Chinese": "漢字" * 300_000,
    "brackets": "[a](" * 250_000,
    "backticks": "".join("`" * (n % 500) + " " for n in range(4000)),
    "emphasis": "**a *b _c " * 100_000,
    "quotes in quotes": "> " * 500_000,
    "lists in lists": "- " * 500_000,
    "headings": "# a\n" * 250_000,
    "headings before what is too large": ("# a\n\n" + "漢" * 1300 + "\n\n") * 400,
    "scraps between what is too large": ("a\n\n```\n" + "b\n" * 620 + "```\n\n") * 600,
    "underlines": "#\n--\n--\n" * 100_000,
    "white space": " \n" * 500_000,
    "markup": "<!--<![CDATA[<?<a href=&" * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("size", "overlap"), [(1200, 0), (60, 59)])
@pytest.mark.unwatched
def test_a_megabyte_of_anything_takes_seconds(name, size, overlap):
    text = HOSTILE[name]
    began = time.process_time()
    chunks = split(text, size, overlap)
    assert time.process_time() - began < 15  # the splitter alone needs minutes for some of them
    assert max(map(len, chunks), default=0) <= size
    assert overlap or squashed("".join(chunks)) == squashed(text)
