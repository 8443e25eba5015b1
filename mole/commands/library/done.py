"""What a verb has done, or would do: a line for each expert, or the same as JSON; and how far it has come."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from mole.commands.library.output import print_json
from mole.experts import Expert, ExpertLibrary
from mole.experts.card import Card
from mole.experts.copying import WRITTEN, Copied
from mole.experts.damage import damage

Format = Literal["table", "json", "names"]
_PAST = {"add": "added", "update": "updated", "edit": "edited", "replace": "replaced", "remove": "removed"}
_PAST |= {"rename": "renamed", "restore": "restored", "repair": "repaired", "import": "imported"}


def done(action: str, *, dry_run: bool) -> str:
    """`added`, or `would add`."""
    return f"would {action}" if dry_run else _PAST[action]


def print_done(rows: Sequence[dict[str, Any]], lines: Sequence[str], form: Format) -> None:
    """The lines; or rows with `name` as JSON; or the names."""
    if form == "json":
        print_json(list(rows))
    elif form == "names":
        print("".join(f"{row['name']}\n" for row in rows), end="")
    else:
        print("".join(f"{line}\n" for line in lines), end="")


def print_change(
    action: str,
    name: str,
    card: Card,
    url: str,
    *,
    dry_run: bool,
    form: Format,
    more: str = "",
    what: str = "",
    at: str = "in",
) -> None:
    """One change of one expert, `what` it is, `at` (in, to) which library."""
    row = {"name": name, "action": action, "revision": card.revision, "library": url, "dry_run": dry_run}
    told = f"{done(action, dry_run=dry_run)} {name}{what} {at} {url}, revision {card.revision[:8]}{more}"
    print_done([row], [told], form)


def print_unchanged(name: str, card: Card, url: str, *, form: Format, how: str = "") -> None:
    """That an expert is what it was asked to become."""
    row = {"name": name, "action": "equal", "revision": card.revision, "library": url}
    print_done([row], [f"unchanged: {name} is in {url} {how or f'at revision {card.revision[:8]}'}"], form)


def repaired_or_unchanged(library: ExpertLibrary, name: str, expert: Expert, *, dry_run: bool, form: Format) -> None:
    """An expert that is there at the revision of `expert`: put again if its files there are damaged, else left."""
    card, url = library.card(name), library.url
    if damage(library, name) is None:
        return print_unchanged(name, card, url, form=form)
    if not dry_run:
        library.add_expert(expert, name)
    return print_change("repair", name, card, url, dry_run=dry_run, form=form, more="; its files were damaged")


def print_copies(steps: Sequence[Copied], url: str, *, dry_run: bool, form: Format) -> None:
    """What was copied to `url`, and how many are equal or left alone."""
    rows = [
        {
            "name": step.name,
            "action": step.action,
            "revision": step.card.revision,
            "was": step.there.revision if step.there else None,
            "library": url,
            "dry_run": dry_run,
        }
        for step in steps
    ]
    lines = []
    for step in steps:
        was = f" (was {step.there.revision[:8]})" if step.there else ""
        if step.action in WRITTEN:
            lines.append(
                f"{done(step.action, dry_run=dry_run)} {step.name} in {url}, revision {step.card.revision[:8]}{was}"
            )
        elif step.action == "skip":
            lines.append(f"skipped {step.name}: {url} has other content{was}")
    written = sum(step.action in WRITTEN for step in steps)
    equal = sum(step.action == "equal" for step in steps)
    lines.append(
        f"{written} {'to copy' if dry_run else 'copied'}, {equal} equal, {len(steps) - written - equal} skipped"
    )
    print_done(rows, lines, form)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """What is told how many of how many are done, and draws a bar; None where nobody looks on."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count, total: bar.update(task, completed=count, total=total)
