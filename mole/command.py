"""What a command is: its words, what it is for, and where its configuration and its `run` are found."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One verb. All but the name has a rule: "library add" is `LibraryAdd` and `run` in mole/commands/library/add.py.

    `operands` are the keys that words without "=" fill, in order; a last one that ends with "…" takes all that are
    left as a list. `module` and `schema` are for those who keep a command elsewhere. A `script` does nothing but run
    other commands: its module has `lines(config)`, their words, in the place of `run`.
    """

    name: str
    phrase: str = ""
    purpose: str = ""
    operands: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    module: str = ""
    schema: str = ""
    script: bool = False
    resumes: bool = True

    @property
    def config_name(self) -> str:
        """The name of its primary config: conf/library-add.yaml for "library add"."""
        return self.name.replace(" ", "-")

    @property
    def module_name(self) -> str:
        """The dotted name of the module that has its config dataclass and its `run`."""
        return self.module or "mole.commands." + self.name.replace(" ", ".").replace("-", "_")

    @property
    def schema_name(self) -> str:
        """The name of its config dataclass."""
        return self.schema or "".join(word.capitalize() for word in self.config_name.split("-"))

    def load(self) -> tuple[type, Callable[[Any], Any]]:
        """Its config dataclass and its `run` (`lines` of a script); imports whatever the command needs."""
        module = importlib.import_module(self.module_name)
        return getattr(module, self.schema_name), module.lines if self.script else module.run
