"""Pages are for strangers: short sentences, the field's words, few numbers in the README, links that lead somewhere."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from test_words import EARLIER

REPOSITORY = Path(__file__).parent.parent
ROOT = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
DOCS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/**/*.md"))
PAGES = [*ROOT, *DOCS, "results/REPORT.md", "results/TRIALS.md"]
# Those earlier words that have no other sense in prose, and two that only prose had
NOT_IN_PROSE = {
    **{now: EARLIER[now] for now in ("relabel", "repair", "estimate of the retrained model", "memorisation gap")},
    "memorised": r"by heart",
    "held-out": r"unseen (?:images|answers|predictions)",
}


def read(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def without_fences(text):
    return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def without_targets(text):
    """Links keep their text. Images go altogether."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))


def prose(text):
    """Text without fences, link targets, tables and headings. Inline code is one word, which may begin a sentence."""
    text = re.sub(r"`[^`]+`", "Code", without_targets(without_fences(text)))
    return re.sub(r"^ *(\||#+ ).*$", "", text, flags=re.MULTILINE)


def word_count(text):
    """Counts what stands between spaces and has a letter or a digit."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def sentences(text):
    """A sentence ends with its paragraph or list item, or at . ! ? before a space and anything but a small letter."""
    for block in re.split(r"\n\s*\n|^ *(?:[-*+]|\d+\.) ", prose(text), flags=re.MULTILINE):
        for sentence in re.split(r"(?<=[.!?])[\"')\]*_]*\s+(?![a-z])", " ".join(block.split())):
            if word_count(sentence):
                yield sentence


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*?) *$", without_targets(without_fences(text)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    counted = [(word_count(sentence), sentence) for sentence in sentences(read(page))]
    too_long = [f"{count} words: {sentence}" for count, sentence in counted if count > 40]
    assert not too_long, "\n".join([page, *too_long])
    assert sum(count for count, _ in counted) / len(counted) <= 20, page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`]+`", "", without_fences(read(page)))):
        path, _, anchor = unquote(link).partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        is_there = target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))
        if not is_there and not re.match(r"[a-z]+:", link):
            lost.append(link)
    assert not lost, "\n".join([page, *lost])


@pytest.mark.parametrize("page", PAGES)
def test_pages_use_the_words_of_the_field(page):
    text = " ".join(re.sub(r"`[^`]+`", "", without_targets(without_fences(read(page)))).split())
    found = [
        f"say {now}: {text[max(0, match.start() - 50) : match.end() + 50]}"
        for now, before in NOT_IN_PROSE.items()
        for match in re.finditer(rf"\b({before})\b", text, re.IGNORECASE)
    ]
    assert not found, "\n".join([page, *found])


def test_readme_and_report_are_short():
    """A number is a run of digits, with a decimal point or without, outside of code fences and link targets."""
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"\d+(?:\.\d+)?", without_targets(without_fences(text)))) <= 40
    assert len(read("results/REPORT.md").splitlines()) <= 400
