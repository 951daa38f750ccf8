"""From a YAML file and overrides to a `RunConfig`, or to one line that says what is wrong."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from depthsearch.config.schema import RunConfig
from depthsearch.config.searches import SearchConfig
from depthsearch.errors import ConfigError

_SHOWN_CHARACTERS = 80
_WORDING = (
    ("Input should be", "must be"),
    ("Dictionary should", "must"),
    ("Tuple should", "must"),
    ("String should", "must"),
    (" after validation, not 0", ""),
    ("a valid boolean", "true or false"),
    ("a valid tuple", "a list, such as [first, 3]"),
    ("a valid", "a"),
    ("a integer", "a whole number"),
    ("should", "must"),
)  # how pydantic says it, how a person who writes YAML does
_STORAGE_FILE = re.compile(r"(sqlite(?:\+\w+)?:///|journal:)(?!/|:memory:|file:)(.+)")
_ARM = 2  # position of an arm's name in compare.arms.NAME.key


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e6` is a number, and a key given twice is an error."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # What `<<` brings in may be given anew, so only the mapping as it was written is checked.
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen: set[object] = set()
        for key_node, _ in node.value:
            merges = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merges else self.construct_object(key_node, deep=True)
            if isinstance(key, str | int):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)


class _Dumper(yaml.SafeDumper):
    """What quotes the texts that `_Loader` would read as something else, such as `12e4`."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides such as `search.seed=3`, and validate the result.

    Values of overrides are YAML. A `space` that is a path is read from that file; it, `model.path`,
    `space.latency` and the texts are looked for beside the run file, then in the working directory;
    a model or text found in neither is left as it is: a hub id. Raises ConfigError.
    """
    path = Path(path)
    data = _read_mapping(path, str(path))
    return config_from_mapping(data, str(path), folder=path.absolute().parent, overrides=overrides)


def config_from_mapping(
    mapping: Mapping[str, Any],
    source: str = "configuration",
    folder: Path | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Validate plain data; `source` names it in errors, `folder` is where paths are looked for.

    Raises ConfigError.
    """
    folder = folder or Path.cwd()
    data: dict[str, Any] = copy.deepcopy(dict(mapping))
    origins: dict[tuple[str, ...], str] = {}
    _expand_space(data, folder, source, origins)
    for override in overrides:
        keys, value = _parse_override(override)
        origin = f"--set {override}"
        _assign(data, keys, value, origin)
        origins[keys] = origin
        _expand_space(data, folder, origin, origins)
    _place_paths(data, folder)
    _complete_arms(data, source)
    _complete_front(data)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source, origins)) from None


def resolved_yaml(config: RunConfig) -> str:
    """The configuration with all defaults as YAML; `load_config` reads it back to an equal one."""
    return to_yaml(config.to_json())


def to_yaml(data: Mapping[str, Any]) -> str:
    """A configuration, or what is left of one to be shown, as YAML that a run file may hold."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_mapping(path: Path, source: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not UTF-8 text, so not a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{source}: can't be read: {error.strerror}") from None
    data = _parse_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: holds {_shown(data)}; expected a mapping of keys to values")
    return data


def _parse_yaml(text: str, source: str) -> object:
    try:
        # `_Loader` is a SafeLoader.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{where}: not valid YAML: {' '.join(problem.split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be read") from None
    except (ValueError, LookupError, AttributeError) as error:
        # What YAML's own types say of a text that looks like one of them, such as 2024-13-45.
        raise ConfigError(
            f"{source}: not valid YAML: {' '.join(str(error).split())}; put a text that looks like "
            "a date or a number in quotes"
        ) from None


def _parse_override(override: str) -> tuple[tuple[str, ...], object]:
    name, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in name.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected key=value, such as search.seed=3")
    return keys, _parse_yaml(text, f"--set {override}")


def _assign(data: dict[str, Any], keys: tuple[str, ...], value: object, origin: str) -> None:
    *parents, last = keys
    for depth, key in enumerate(parents, start=1):
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise ConfigError(f"{origin}: {'.'.join(keys[:depth])} is {_shown(data)}, no mapping")
    data[last] = value


def _expand_space(
    data: dict[str, Any], folder: Path, source: str, origins: dict[tuple[str, ...], str]
) -> None:
    """Replace a `space` that is a path by what that file holds."""
    name = data.get("space")
    if not isinstance(name, str):
        return
    found = _find(name, folder)
    if found is None:
        raise ConfigError(
            f"{source}: space: no such file: {name}; expected a mapping or the path of a YAML file"
        )
    data["space"] = _read_mapping(found, str(found))
    origins[("space",)] = str(found)


def _find(name: str, folder: Path) -> Path | None:
    """Where `name` exists: beside the run file, else in the working directory, else nowhere.

    What can't be looked at is nowhere: whoever reads it says why, and others don't need it.
    """
    for place in (folder, Path.cwd()):
        # A folder without permission, a name that is too long, `~` of a user who is not known.
        with suppress(OSError, RuntimeError):
            path = place / Path(name).expanduser()
            if path.exists():
                # A link keeps its name, which says what it is: that of its target may be a hash.
                plain = path.name not in ("", "..")
                return path.parent.resolve() / path.name if plain else path.resolve()
    return None


def _place_paths(data: dict[str, Any], folder: Path) -> None:
    """Make the paths of what exists absolute, so that a run can be resumed from anywhere."""
    search, compare = data.get("search"), data.get("compare")
    arms = compare.get("arms") if isinstance(compare, dict) else None
    for part in (search, *(arms.values() if isinstance(arms, dict) else ())):
        options = part.get("options") if isinstance(part, dict) else None
        if isinstance(options, dict) and isinstance(options.get("storage"), str):
            options["storage"] = _placed_storage(options["storage"])
    for section, key in (
        ("model", "path"),
        ("space", "latency"),
        ("calibration", "text"),
        ("calibration", "fit_text"),
    ):
        part = data.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key]:
            found = _find(part[key], folder)
            part[key] = str(found) if found else part[key]


def _placed_storage(url: str) -> str:
    """The URL of an Optuna storage, the file that it may name looked for in the working directory.

    Others, such as a server's or one in memory, stay as they are.
    """
    found = _STORAGE_FILE.fullmatch(url)
    here = Path.cwd()
    # What follows a question mark would be read as settings.
    return f"{found[1]}{here / found[2]}" if found and "?" not in str(here) else url


def _complete_arms(data: dict[str, Any], source: str) -> None:
    """Fill each arm up from `search`; options only where the method is the same."""
    base, compare = data.get("search") or {}, data.get("compare")
    arms = compare.get("arms") if isinstance(compare, dict) else None
    if not isinstance(arms, dict) or not isinstance(base, dict):
        return
    default = cast(str, SearchConfig.model_fields["method"].default)
    for name, arm in arms.items():
        if not isinstance(arm, dict):
            continue
        for key, instead in (("seed", "compare.seeds"), ("cost_tokens", "compare.cost_tokens")):
            if key in arm and arm[key] != base.get(key, SearchConfig.model_fields[key].default):
                raise ConfigError(
                    f"{source}: compare.arms.{name}.{key} is {_shown(arm[key])}: all arms share "
                    f"it; set {instead} instead"
                )
        options, shared = arm.get("options") or {}, base.get("options") or {}
        method = base.get("method", default)
        mappings = isinstance(options, dict) and isinstance(shared, dict)
        if mappings and arm.get("method", method) == method:
            options = {**shared, **options}
        arms[name] = {**base, **arm, "options": options}


def _complete_front(data: dict[str, Any]) -> None:
    """Give the budgets of the front what they don't say themselves of what ratios refer to."""
    space, front = data.get("space"), data.get("front")
    own = space.get("budget") if isinstance(space, dict) else None
    if not isinstance(own, dict) or not isinstance(front, dict):
        return
    given = {key: own[key] for key in ("of", "context_tokens") if key in own}
    for key in ("budgets", "second"):
        if isinstance(budgets := front.get(key), list):
            front[key] = [{**given, **b} if isinstance(b, dict) else b for b in budgets]


def _explain(error: ValidationError, source: str, origins: Mapping[tuple[str, ...], str]) -> str:
    """One line for the first error; unknown keys come first, since they cause others."""
    unknown = ("extra_forbidden", "invalid_key")
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in unknown)
    first = details[0]
    keys = tuple(str(part) for part in first["loc"])
    origin = source
    for prefix, name in sorted(origins.items(), key=lambda item: len(item[0])):
        shared = min(len(prefix), len(keys))
        if keys[:shared] == prefix[:shared] and first["type"] != "missing":
            origin = name
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{origin}: {_problem(first, keys)}{more}"


def _problem(detail: ErrorDetails, keys: tuple[str, ...]) -> str:
    dotted = ".".join(keys)
    if keys[-1:] == ("[key]",):
        # Wrong is the name itself: pydantic lists it as what leads to its key.
        dotted = f"a name in {'.'.join(keys[:-2])}"
    message = detail["msg"].removeprefix("Value error, ")
    for said, better in _WORDING:
        message = message.replace(said, better)
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        names = _fields_at(keys[:-1])
        close = difflib.get_close_matches(keys[-1], names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {dotted!r}; {hint}allowed: {', '.join(names)}"
    if detail["type"] == "missing":
        model = _model_at(keys[:-1])
        meaning = model.model_fields[keys[-1]].description if model else ""
        return f"{dotted!r} is missing: {meaning}"
    if detail["type"] == "model_type":
        names = _fields_at(keys)
        message = f"must be a mapping with the keys {', '.join(names)}"
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        allowed = re.findall(r"'([^']*)'", message)
        close = difflib.get_close_matches(detail["input"], allowed, n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    if detail["type"] == "string_pattern_mismatch":
        model = _model_at(keys[:-1])
        message = f"must be {model.model_fields[keys[-1]].description}" if model else message
    return f"{dotted} is {_shown(detail['input'])}; {message[0].lower()}{message[1:]}"


def _fields_at(keys: tuple[str, ...]) -> list[str]:
    model = _model_at(keys)
    names = list(model.model_fields) if model is not None else []
    if model is SearchConfig and keys[:1] == ("compare",):
        names = [name for name in names if name not in ("seed", "cost_tokens")]
    return names


def _model_at(keys: tuple[str, ...]) -> type[BaseModel] | None:
    """The part of the schema that `keys` leads to, None when it is not a section."""
    if keys[:_ARM] == ("compare", "arms"):
        return SearchConfig if len(keys) > _ARM else None
    model: type[BaseModel] = RunConfig
    for key in keys:
        if key.isdigit():
            # A place in a list of sections, such as compare.budgets.0.
            continue
        field = model.model_fields.get(key)
        if field is None:
            return None
        options = (field.annotation, *get_args(field.annotation))
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not sections:
            return None
        model = sections[0]
    return model


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
