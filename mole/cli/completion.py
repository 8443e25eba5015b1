"""TAB: what may stand next on the line, for bash, zsh and fish. Nothing here imports torch or asks the network."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mole.command import Command

if TYPE_CHECKING:
    from mole.config.engine import Engine

SHELLS = {
    "bash": r"""_mole() {
  local line word out kept="" candidate IFS=$'\n'
  line="${COMP_LINE:0:$COMP_POINT}"; word="${line##* }"
  out=$(COMP_LINE="$line" mole __complete 2>/dev/null) || return 0
  # bash splits words at = and : and completes the last piece alone
  [[ "$word" == *[=:]* ]] && kept="${word%"${word##*[=:]}"}"
  COMPREPLY=()
  for candidate in $out; do COMPREPLY+=("${candidate#"$kept"}"); done
  if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" != *[=./,] ]]; then COMPREPLY[0]+=" "; fi
}
complete -o nospace -F _mole mole""",
    "zsh": r"""#compdef mole
_mole() {
  local -a open closed
  local candidate
  for candidate in ${(f)"$(COMP_LINE="$LBUFFER" mole __complete 2>/dev/null)"}; do
    if [[ $candidate == *[=./,] ]]; then open+=("$candidate"); else closed+=("$candidate"); fi
  done
  (( ${#open} )) && compadd -S '' -- $open
  (( ${#closed} )) && compadd -- $closed
  return 0
}
compdef _mole mole""",
    "fish": r"""function __mole_complete
    set -lx COMP_LINE (commandline -cp)
    mole __complete 2>/dev/null
end
complete -c mole -f -a '(__mole_complete)'""",
}

_FOLDER_FLAGS = ("--from", "--resume", "--config-dir")
_FOLDER_KEYS = (
    *("library", "expert", "model", "mixture", "folder", "dest", "to", "start_library", "start_from", "into"),
    *("run", "runs", "places", "source", "target", "local", "remote", "one", "other"),
)
_RUN_KEYS = ("run", "runs", "places", "mixture")


def complete(line: str, commands: Mapping[str, Command], flags: Sequence[str]) -> list[str]:
    """Candidates for the last word of `line` (up to the cursor), each with what that word has already."""
    words = line.split(" ")
    words = [words[0], *(w for w in words[1:-1] if w), words[-1]]
    word, before = words[-1], words[1:-1]
    if not before:
        firsts = {name.partition(" ")[0] for name in commands} | {"completion"}
        return _matching(word, firsts)
    if before == ["completion"]:
        return _matching(word, SHELLS)
    name = next((n for n in (" ".join(before[:2]), before[0]) if n in commands), None)
    if name is None:
        family = [n.partition(" ")[2] for n in commands if n.startswith(f"{before[0]} ")]
        return _matching(word, family) if len(before) == 1 else []
    if before[-1] in _FOLDER_FLAGS:
        return list(dict.fromkeys([*(_runs(word) if before[-1] != "--config-dir" else []), *_folders(word)]))
    if word.startswith("-"):
        return _matching(word, flags)
    return _settings(commands[name], before[len(name.split()) :], word)


def _settings(command: Command, before: list[str], word: str) -> list[str]:
    from omegaconf import OmegaConf

    from mole.config.engine import engine
    from mole.config.overrides import is_override, rewrite
    from mole.config.saved import leaves

    with engine(command.config_name, config_folders(before)) as tree:
        groups = tree.groups()
        key, equals, start = word.partition("=")
        if equals and key in groups:
            return _options(key, start, tree.options(key), several=tree.takes_several(key))
        if equals:
            is_folder = key.rpartition(".")[2] in (*_FOLDER_KEYS, "path", "url")
            return [f"{key}={folder}" for folder in _folders(start)] if is_folder else []
        chosen = []
        for given in before:
            if is_override(given) and given.partition("=")[0] in groups:
                try:
                    chosen += rewrite([given], tree, sweep=True)
                except ValueError:
                    continue  # a word that is wrong does not spoil the others
        node = OmegaConf.to_container(tree.compose([c for c in chosen if "," not in c]), resolve=False)
        known = {f"{group}=" for group in groups} | {f"{key}=" for key in leaves(node)}
        found = _matching(word, known)
        flagged = {i + 1 for i, w in enumerate(before) if w in _FOLDER_FLAGS}
        given = [w for i, w in enumerate(before) if not is_override(w) and not w.startswith("-") and i not in flagged]
        return found + _operand(command, given, word, tree, found)


def _operand(command: Command, given: Sequence[str], word: str, tree: "Engine", found: Sequence[str]) -> list[str]:
    """What the next word without "=" may be: a run, a folder, a name in the library named before, a file of conf/."""
    keys = [o.rstrip("…") for o in command.operands]
    if not keys or (len(given) >= len(keys) and not command.operands[-1].endswith("…")):
        return []
    key = keys[min(len(given), len(keys) - 1)]
    if key in ("name", "names", "old") and keys[0] == "library" and given:
        return [name for name in _experts(given[0], word) if name not in given[1:]]
    if key == "group" and command.name == "config ls":
        return _matching(word, {o.partition("/")[0] for o in _conf(tree.folders) if "/" in o})
    if key == "what":
        return _matching(word, _conf(tree.folders))
    if key not in _FOLDER_KEYS:
        return []
    runs = _runs(word) if key in _RUN_KEYS else []
    folders = _folders(word) if word.startswith((".", "/", "~")) or not found else []
    return list(dict.fromkeys([*runs, *folders]))


def _runs(word: str) -> list[str]:
    """Runs where commands leave them: outputs/<command>/<run>/."""
    if word and not "outputs/".startswith(word) and not word.startswith("outputs/"):
        return []
    return _matching(word, [f"{record.parent}/" for record in Path("outputs").glob("*/*/run.json")])


def _experts(library: str, word: str) -> list[str]:
    """Names in a library that is a folder here."""
    root = Path(library).expanduser()
    return _matching(word, [card.parent.name for card in root.glob("*/expert.json")]) if root.is_dir() else []


def _conf(folders: Sequence[Path]) -> set[str]:
    """What `config show` takes: every option as group/option, and the commands."""
    files = {file.relative_to(f) for f in folders for depth in ("*.yaml", "*/*.yaml") for file in f.glob(depth)}
    return {file.with_suffix("").as_posix() for file in files}


def config_folders(words: Sequence[str]) -> list[str]:
    """The user's configuration folders that a line and the environment name, in the order in which they count."""
    found = [w.partition("=")[2] for w in words if w.startswith("--config-dir=")]
    found += [after for flag, after in itertools.pairwise(words) if flag == "--config-dir"]
    return [*found, *filter(None, os.environ.get("MOLE_CONFIG_DIR", "").split(os.pathsep))]


def _options(group: str, start: str, options: Iterable[str], several: bool) -> list[str]:
    """After `group=`: its options; inside a list or a sweep those that are not there yet."""
    for separator in (",", "["):
        if separator in start and (separator == "," or several):
            done, _, rest = start.rpartition(separator)
            used = done.strip("[").split(",")
            return [f"{group}={done}{separator}{o}" for o in _matching(rest, options) if o not in used]
    return [f"{group}={o}" for o in _matching(start, options)]


def _folders(start: str) -> list[str]:
    """Folders that a path so far may mean, each with a slash behind it."""
    parent, _, name = start.rpartition("/")
    shown = f"{parent}/" if "/" in start else ""
    root = Path(shown or ".").expanduser()
    if not root.is_dir():
        return []
    found = [entry.name for entry in root.iterdir() if entry.is_dir()]
    return [f"{shown}{n}/" for n in _matching(name, found) if name.startswith(".") or not n.startswith(".")]


def _matching(start: str, words: Iterable[str]) -> list[str]:
    return sorted(word for word in words if word.startswith(start))
