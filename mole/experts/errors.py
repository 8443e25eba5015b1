"""What can go wrong with an expert or a library: one class for each thing that a caller may want to tell apart."""

from mole.untrusted import Damaged, LibraryError, Refused

__all__ = ["Conflict", "Damaged", "LibraryError", "NoLibrary", "ReadOnly", "Refused", "UnknownExpert", "Unreachable"]


class NoLibrary(LibraryError):
    """There is no library at that address."""


class UnknownExpert(LibraryError, KeyError):
    """The library has no expert of that name, or not that revision of it."""

    def __str__(self) -> str:
        return str(self.args[0])


class Conflict(LibraryError):
    """The name is taken, or somebody else changed the expert first. `revision` is what is there now."""

    def __init__(self, message: str, revision: str | None = None):
        super().__init__(message)
        self.revision = revision

    def __reduce__(self):
        return type(self), (self.args[0], self.revision)


class Unreachable(LibraryError):
    """The place of the library does not answer, also when asked again, or answers with an error of its own.

    Its cause is the scrubbed text of what went wrong: a client's own error carries the request, and so the token.
    """


class ReadOnly(LibraryError):
    """The library cannot be written."""
