"""Compose a Hydra config once, freeze it into a dataclass, and explain what is wrong with it."""

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from trainer.errors import BadInput

T = TypeVar("T")

_HINTS = {
    "missing": "is missing; add it",
    "unexpected_keyword_argument": "is not a key of this configuration; remove it",
}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a frozen, slotted, keyword-only dataclass that refuses unknown keys.

    The string under each field says its meaning and unit; `kiln COMMAND --help` prints it.
    """
    rules = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return pydantic_dataclass(config=rules, frozen=True, kw_only=True, slots=True)(cls)  # type: ignore[return-value]


def compose(
    cls: type[T], primary: str, overrides: Sequence[str], *, command: str | None = None
) -> T:
    """Compose `conf/<primary>.yaml` with command-line overrides and freeze the result.

    Args:
        cls: The config dataclass.
        primary: Name of the YAML.
        overrides: Words, key=value.
        command: That was typed, where its name is not the YAML's.

    Raises:
        BadInput: An unknown key, a missing value or an impossible one, with its path and a remedy.
    """
    return freeze(cls, compose_dict(primary, overrides, command=command))


def compose_dict(
    primary: str,
    overrides: Sequence[str],
    *,
    require_all: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Compose without freezing: plain containers, with every interpolation resolved.

    Without `require_all`, keys that still lack a value stay in as '???'.
    """
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise BadInput(
                f"got the argument '{override}', need key=value. "
                f"`kiln {command or primary} --help` lists the keys."
            )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            composed = hydra_compose(primary, overrides=list(overrides))
        return _to_plain(composed, require_all=require_all)
    except HydraException as error:
        raise BadInput(_explain_hydra(error, primary)) from error


def expand(words: Sequence[str], primary: str) -> tuple[list[str], list[list[str]]]:
    """Split words that give several values, in Hydra's grammar: seed=0,1,2 or width=range(8,65,8).

    Returns:
        The words that give one value, and for each combination of the others its words.

    Raises:
        BadInput: A word cannot be read, or its values cannot be counted.
    """
    GlobalHydra.instance().clear()
    fixed: list[str] = []
    choices: dict[str, list[str]] = {}
    try:
        with initialize_config_module("conf", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()  # knows what glob(*) may mean
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
            for word, override in zip(words, parsed, strict=True):
                if not override.is_sweep_override():
                    fixed.append(word)
                elif not override.is_discrete_sweep():
                    raise BadInput(f"{word} has no end of values. Give them: a,b,c or range(1,4).")
                else:
                    key = override.get_key_element()
                    values = override.sweep_string_iterator()
                    choices[key] = [f"{key}={value}" for value in values]
    except HydraException as error:
        raise BadInput(_explain_hydra(error, primary)) from error
    return fixed, [list(combination) for combination in itertools.product(*choices.values())]


def freeze(cls: type[T], data: Mapping[str, Any]) -> T:
    """Check plain containers against a config dataclass and freeze them."""
    try:
        return TypeAdapter(cls).validate_python(dict(data))
    except ValidationError as error:
        raise BadInput("\n".join(_explain_validation(error))) from error


def thaw(frozen: Any) -> dict[str, Any]:  # noqa: ANN401 - any config dataclass
    """Turn a frozen config back into plain containers, in field order."""
    return TypeAdapter(type(frozen)).dump_python(frozen, mode="json")  # type: ignore[no-any-return]


def write_yaml(frozen: Any, path: Path) -> None:  # noqa: ANN401 - any config dataclass
    """Write a frozen config as YAML that `read_yaml` gives back unchanged."""
    path.write_text(yaml.safe_dump(thaw(frozen), sort_keys=False), encoding="utf-8")


def read_yaml(cls: type[T], path: Path) -> T:
    """Read a frozen config back; workers do this and never import a composition."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there; is {path.parent} a run directory?") from error
    return freeze(cls, data)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield 'path: old -> new' for every leaf in which two plain configs differ."""
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}"


def field_help(cls: Any, prefix: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - a dataclass
    """Yield (dotted key, meaning) for every field of a config dataclass, depth first."""
    for name, field in getattr(cls, "__pydantic_fields__", {}).items():
        variants = [t for t in (field.annotation, *get_args(field.annotation)) if _is_config(t)]
        yield f"{prefix}{name}", " ".join((field.description or "").split())
        for variant in variants:
            yield from field_help(variant, f"{prefix}{name}.")


def _is_config(annotation: object) -> bool:
    return dataclasses.is_dataclass(annotation) and hasattr(annotation, "__pydantic_fields__")


def _to_plain(composed: DictConfig, *, require_all: bool) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(composed, resolve=require_all, throw_on_missing=require_all)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        # A value that is made of a missing one is not itself what to give.
        deeper = re.search(r"Missing mandatory value: (\S+)", str(error))
        if deeper and not key.endswith(deeper.group(1)):
            key = deeper.group(1)
        raise BadInput(f"{key} has no value; give it: {key}=...") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _explain_hydra(error: HydraException, primary: str) -> str:
    text = str(error)
    match = re.search(r"Could not override '([^']+)'", text)
    if match is None:
        return text
    got = match.group(1)
    with initialize_config_module("conf", version_base="1.3"):
        plain = OmegaConf.to_container(hydra_compose(primary), resolve=False)
    known = sorted(key for key, _ in dotted_values(plain))
    close = difflib.get_close_matches(got, known, n=3, cutoff=0.5)
    advice = f"Did you mean {' or '.join(close)}?" if close else f"Known keys: {', '.join(known)}."
    return f"got the key '{got}', which conf/{primary}.yaml does not have. {advice}"


def dotted_values(node: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as text) for every key of nested mappings, depth first."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}", "" if isinstance(value, Mapping) else str(value)
            yield from dotted_values(value, f"{prefix}{key}.")


def _explain_validation(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        got = problem.get("input")
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in _HINTS:
            yield f"{path} {_HINTS[problem['type']]}."
        elif problem["type"] == "value_error":
            yield f"{path}: {message}" if path else message
        else:
            yield f"{path}={got!r}: {message}."
