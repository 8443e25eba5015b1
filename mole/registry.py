"""Names of variants: every adapter, router, dataset … joins its group here under a short name, with its config.

A variant's file registers it; nothing else refers to the class by path:

    @ROUTERS.register("uniform", UniformConfig)
    class UniformRouter(Router): ...

The config dataclass is closed, frozen and strict (pydantic), and its first field is `name: Literal["uniform"]`.
A command's dataclass takes `ROUTERS.union()` as the type of its `router` field: the union over what has joined,
told apart by `name`.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config_dataclass(cls: C) -> C:
    """A dataclass for configuration: frozen, keyword-only, unknown keys and wrong types refused.

    In pydantic's JSON mode strict still turns a YAML list into a tuple and a whole number into a float, but refuses
    "3" for 3, 1.0 for 1 and true for 1. Rules across fields belong into `__post_init__`, gathered and raised once.
    """
    closed = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=closed)(cls)  # type: ignore[return-value]


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like `word`, best first; none if nothing is near."""
    return difflib.get_close_matches(word, [str(k) for k in known], n=count, cutoff=0.5)


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """One line for an error: what was given, the nearest known word, all known words."""
    names = sorted(str(k) for k in known)
    near = nearest(given, names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {what} {given!r}{hint} (known: {', '.join(names) or 'none'})"


@dataclass(frozen=True)
class Variant(Generic[T]):
    """One member of a group: its name, what builds it (a class or a function), its config dataclass."""

    name: str
    implementation: Callable[..., T]
    config: type


class Registry(Generic[T]):
    """The variants of one group of `conf/`, by name."""

    def __init__(self, group: str):
        self.group = group
        self._variants: dict[str, Variant[T]] = {}

    def register(self, name: str, config: type) -> Callable[[Any], Any]:
        """Class or function decorator: joins the group as `name` with the config dataclass `config`."""

        def join(implementation: Any) -> Any:
            if name in self._variants:
                raise ValueError(f"{self.group}: {name!r} is registered twice")
            self._variants[name] = Variant(name, implementation, config)
            return implementation

        return join

    def __getitem__(self, name: str) -> Variant[T]:
        if name not in self._variants:
            raise ValueError(unknown(self.group, name, self._variants))
        return self._variants[name]

    def __contains__(self, name: str) -> bool:
        return name in self._variants

    def __iter__(self):
        return iter(self._variants.values())

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._variants)

    def build(self, config: Any, *args: Any, **kwargs: Any) -> T:
        """The variant that `config.name` names, built from this config."""
        return self[config.name].implementation(config, *args, **kwargs)

    def union(self) -> Any:
        """The type of a config field that takes any variant of the group."""
        configs = tuple(variant.config for variant in self._variants.values())
        if len(configs) == 1:
            return configs[0]
        return Annotated[Union[configs], Field(discriminator="name")]  # noqa: UP007  (a tuple, not a literal)


BACKBONES: Registry[Any] = Registry("backbone")
DATASETS: Registry[Any] = Registry("dataset")
ADAPTERS: Registry[Any] = Registry("adapter")
ROUTERS: Registry[Any] = Registry("router")
MERGES: Registry[Any] = Registry("method")
LIBRARIES: Registry[Any] = Registry("library")
OPTIMIZERS: Registry[Any] = Registry("optimizer")
SCHEDULES: Registry[Any] = Registry("schedule")
TRACKERS: Registry[Any] = Registry("tracker")
