"""Names of experts: one that was given none has its only task's, else its folder's; `name@revision` is two words."""

from mole.experts import Expert, LibraryError, is_name, proposal


def own_name(expert: Expert, folder: str) -> str:
    """The expert's only task, made a name; else the folder's name. LibraryError if neither can be one."""
    if len(expert.card.tasks) == 1:
        return proposal(expert.card.tasks[0])
    if is_name(folder) and folder != "expert":
        return folder
    raise LibraryError(f"which name shall it have? add name=…, for instance name={proposal(folder)}")


def name_and_revision(given: str, revision: str | None = None) -> tuple[str, str | None]:
    """`name` or `name@revision` → both. Raises LibraryError for two revisions, or none behind the @."""
    name, at, behind = given.partition("@")
    if at and not behind:
        raise LibraryError(f"which revision? write {name}@<its first 8 digits>; mole library history tells them")
    if at and revision is not None:
        raise LibraryError(f"{given} and revision={revision}: give one of them")
    return name, behind or revision
