"""Breaks the Hub's backend on purpose, as mutants.py does with the others; run by hand in the same way."""

from __future__ import annotations

import sys

from mutants import BACKENDS, Mutant, main

HUB, FAULTS, HOSTILE, LEAKS = (
    f"tests/experts/backends/test_hub{part}.py" for part in ("", "_faults", "_hostile", "_leaks")
)
READING, REQUESTS, WRITING, BACKEND = (
    f"{BACKENDS}/{name}.py" for name in ("hub_reading", "hub_requests", "hub_writing", "hub")
)

MUTANTS = [
    Mutant("hub: no parent commit", WRITING, "parent_commit=head, **texts", "**texts", (FAULTS, "another_writer")),
    Mutant(
        "hub: busy is not asked again",
        REQUESTS,
        "408, 409, 412, 425",
        "408, 412, 425",
        (FAULTS, "passing_fault and publish"),
    ),
    Mutant(
        "hub: a change that is there is not recognised",
        WRITING,
        "card.oid == git_id(entry.card_bytes)",
        "not card",
        (HUB, "makes_no_commit"),
    ),
    Mutant(
        "hub: a lost answer is not recognised when others went on",
        WRITING,
        "if uncertain and (",
        "if not uncertain and (",
        (FAULTS, "lost_answer"),
    ),
    Mutant(
        "hub: expect is not compared",
        WRITING,
        "if (row.oid if row else None) != entry.expect:",
        "if False:",
        (HUB, "batch_with_a_conflict"),
    ),
    Mutant(
        "hub: stale files are left", WRITING, "if exists else []", "if not exists else []", (HUB, "new_revision_lacks")
    ),
    Mutant(
        "hub: a folder of others is written over",
        WRITING,
        "row is not None and card is None:",
        "row is None and card is None:",
        (HUB, "without_a_card"),
    ),
    Mutant(
        "hub: made for all to see",
        WRITING,
        "private=private, exist_ok",
        "private=False, exist_ok",
        (HUB, "only_if_asked"),
    ),
    Mutant(
        "hub: titles with secrets",
        WRITING,
        "scrub_text(batch.title).split()",
        "batch.title.split()",
        (LEAKS, "no_commit"),
    ),
    Mutant(
        "hub: the digest is not compared",
        READING,
        'if digest == wanted["sha256"]:',
        "if digest:",
        (HOSTILE, "damaged_download"),
    ),
    Mutant(
        "hub: sizes of the listing are believed",
        READING,
        'if row.size != wanted["size"]:',
        "if row.size < 0:",
        (HOSTILE, "refused_before"),
    ),
    Mutant("hub: paths are not checked", READING, "or _BAD.search(path)", "or not path", (HOSTILE, "hostile_listing")),
    Mutant("hub: dots in paths", READING, 'if {"", ".", ".."} & set', "if set() & set", (HOSTILE, "hostile_listing")),
    Mutant("hub: rows twice", READING, "if row.path in found or (folder", "if (folder", (HOSTILE, "hostile_listing")),
    Mutant(
        "hub: pickles are not refused",
        READING,
        "    refuse_pickles(found, where)\n",
        "",
        (HOSTILE, "what_its_card_says"),
    ),
    Mutant(
        "hub: no end of pages",
        READING,
        "if not value or count > most:",
        "if count > most:",
        (HOSTILE, "pages_without_end and given_up"),
    ),
    Mutant(
        "hub: the token goes everywhere",
        REQUESTS,
        "None if at_home else False",
        "None",
        (HOSTILE, "never_gets_the_token"),
    ),
    Mutant(
        "hub: the next page from anywhere",
        REQUESTS,
        "!= _origin(self.endpoint):",
        "!= _origin(following):",
        (HOSTILE, "another_host"),
    ),
    Mutant(
        "hub: the wish to wait is ignored", REQUESTS, "pause = max(least, ", "pause = max(0.0, ", (FAULTS, "pause_that")
    ),
    Mutant(
        "hub: a packed answer is taken", REQUESTS, 'if packed != "identity":', "if not packed:", (HOSTILE, "packed")
    ),
    Mutant(
        "hub: logs are not scrubbed",
        REQUESTS,
        "logger.addFilter(_Scrubbed())",
        "pass",
        (LEAKS, "holds_a_secret and resolve"),
    ),
    Mutant("hub: signatures stay in texts", REQUESTS, '_QUERY.sub(r"\\1?<…>", ', "str(", (LEAKS, "no_query")),
    Mutant(
        "hub: errors repeat what was sent back",
        REQUESTS,
        "shown(scrub_text(value if isinstance(value, str) else repr(value)), 200)",
        "shown(value, 200)",
        (LEAKS, "holds_a_secret and revision"),
    ),
    Mutant(
        "hub: folders without a card are listed",
        BACKEND,
        "if found[name] in self._proven",
        "if found[name]",
        (HUB, "without_a_card"),
    ),
    Mutant(
        "hub: each listing anew", BACKEND, "if self._listed[0] != head:", "if head:", (HUB, "unchanged_library_is_one")
    ),
    Mutant(
        "hub: tags are written",
        BACKEND,
        "if self._is_branch:\n            return",
        "if self._revision:\n            return",
        (HUB, "tag_and_a_commit"),
    ),
    Mutant(
        "hub: what a commit says is believed",
        BACKEND,
        "if card is not None and card.revision.startswith(revision):",
        "if card is not None:",
        (HUB, "is_a_hint"),
    ),
    Mutant(
        "hub: a failed fetch leaves files",
        BACKEND,
        "shutil.rmtree(entry) if entry.is_dir() else entry.unlink()",
        "pass",
        (HOSTILE, "full_disk"),
    ),
]


if __name__ == "__main__":
    sys.exit(bool(main(MUTANTS, sys.argv[1:])))
