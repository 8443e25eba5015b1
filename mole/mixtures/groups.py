"""Which mixed modules share one router of the layers: each its own, those of a block, of a named group, or all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BLOCK = re.compile(r"^(.*?\.\d+)(?=\.|$)")


def groups_of(sites: Sequence[str], config: Any) -> dict[str, tuple[str, ...]]:
    """Group → its sites, both in the order of `sites`, as the router's config places its routers.

    A group is named after what its sites share: the site itself, the path of the block, or the captures of `group_by`.
    Raises ValueError for sites that belong to no group, and for more groups than sites.
    """
    scope = getattr(config, "scope", "layer")
    if scope == "model":
        return {"model": tuple(sites)}
    if scope == "group" and config.num_groups is not None:
        return _runs(sites, config.num_groups)
    keys = {site: site for site in sites}
    if scope == "block":
        keys = {site: _key(_BLOCK.match(site), None) for site in sites}
    elif scope == "group":
        try:
            pattern = re.compile(config.group_by)
        except re.error as error:
            raise ValueError(f"router.group_by: {config.group_by!r} is not a regular expression: {error}") from None
        keys = {site: _key(pattern.search(site), pattern) for site in sites}
    lost = [site for site, key in keys.items() if key is None]
    if lost and config.rest == "error":
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise ValueError(
            f"router.scope={scope}: no group for {shown}; widen router.group_by, or set router.rest=layer to give each "
            "a router of its own"
        )
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(keys[site] or site, []).append(site)
    return {name: tuple(members) for name, members in found.items()}


def _key(match: re.Match | None, pattern: re.Pattern | None) -> str | None:
    """What the match captured, joined; the match itself where nothing is captured; None without a match."""
    if match is None:
        return None
    return ".".join(match.groups("")) if pattern is None or pattern.groups else match.group()


def _runs(sites: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    if count > len(sites):
        raise ValueError(f"router.num_groups={count} with {len(sites)} mixed modules: lower router.num_groups")
    ends = [len(sites) * (i + 1) // count for i in range(count)]
    starts = [0, *ends[:-1]]
    return {f"run-{i}": tuple(sites[a:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))}
