"""The name of an expert that was given none: its only task's, else its folder's."""

from mole.experts import Expert, LibraryError, is_name, proposal


def own_name(expert: Expert, folder: str) -> str:
    """The expert's only task, made a name; else the folder's name. LibraryError if neither can be one."""
    if len(expert.card.tasks) == 1:
        return proposal(expert.card.tasks[0])
    if is_name(folder) and folder != "expert":
        return folder
    raise LibraryError(f"which name shall it have? add name=…, for instance name={proposal(folder)}")
