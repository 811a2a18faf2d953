"""The model of a recipe: a preset or a config.json, and changes to it."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.problems import ProblemsError
from dar_train.recipes.checks import did_you_mean

_FLOATS = ("norm_eps", "rope_base", "dit.data_std", "dit.time_shift")
_DIVISORS = (  # what must divide what
    ("patch_size", "image_size"),
    ("dit.patch_size", "image_size"),
    ("num_groups", "num_tokens"),
    ("heads", "dim"),
)


ConfigT = TypeVar("ConfigT", PriorConfig, TokenizerConfig)


def build_config(
    cls: type[ConfigT],
    presets: Mapping[str, ConfigT],
    model: str,
    overrides: Sequence[str],
) -> ConfigT:
    """The configuration that a recipe's model and changes stand for.

    Raises:
        ProblemsError: where it cannot be read, a change is none, or it contradicts itself.
    """
    try:
        values = model_values(model, {name: config.to_dict() for name, config in presets.items()})
        values = overridden(values, overrides)
        check_values(values)
        return cls.from_dict(values)
    except ProblemsError:
        raise
    except (ValueError, TypeError) as error:  # a configuration names itself, a recipe its field
        text = str(error)
        raise ProblemsError([text if text.startswith("model: ") else f"model: {text}"]) from error


def model_values(model: str, presets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration of a preset, or that in a config.json.

    Raises:
        ValueError: where it is neither.
    """
    if model in presets:
        return presets[model]
    file = Path(model)
    if not file.is_file():
        raise ValueError(
            f"model: expected one of {sorted(presets)} or a config.json, got {model!r}"
            f"{did_you_mean(model, presets)}"
        )
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected JSON in {file}, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model: expected a JSON object in {file}, got {type(values).__name__}")
    # what `save_model` adds to a configuration
    return {key: value for key, value in values.items() if not key.startswith("_")}


def keys_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration: depth, dit.depth, …"""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def look_up(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    place: Any = values
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with changes such as `dit.depth=8`, the value being JSON.

    Raises:
        ProblemsError: a line for each change that is none.
    """
    result = copy.deepcopy(values)
    known = list(keys_of(values))
    problems = []
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or key not in known:
            problems.append(
                f"override: expected key=value with a key of the model, got {text!r}"
                f"{did_you_mean(key, known)}"
            )
            continue
        *parents, leaf = key.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        try:
            place[leaf] = json.loads(raw)
        except (ValueError, RecursionError):
            problems.append(f"override: expected a JSON value in {text!r}")
    if problems:
        raise ProblemsError(problems)
    return result


def merged_overrides(*layers: Sequence[str]) -> tuple[str, ...]:
    """The changes of all layers; of two to one key the later one counts."""
    last = {text.partition("=")[0]: text for layer in layers for text in layer}
    return tuple(last.values())


def check_values(values: Mapping[str, Any]) -> None:
    """What a configuration's own checks would name one at a time, or not at all.

    Raises:
        ProblemsError: a line for each value of another type, and for each that divides badly.
    """
    problems = []
    if not isinstance(values.get("dit", {}), Mapping):
        raise ProblemsError([f"model.dit: expected an object, got {values['dit']!r}"])
    for key in sorted(set(keys_of(values)) & set(_FLOATS)):
        value = look_up(values, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"model.{key}: expected a number, got {value!r}")
    for key, whole_key in _DIVISORS:
        part, whole = look_up(values, key), look_up(values, whole_key)
        sizes = [x for x in (part, whole) if isinstance(x, int) and not isinstance(x, bool)]
        if len(sizes) == 2 and min(sizes) > 0 and whole % part:
            problems.append(f"model.{key}: expected a divisor of {whole_key} {whole}, got {part}")
    if problems:
        raise ProblemsError(problems)
