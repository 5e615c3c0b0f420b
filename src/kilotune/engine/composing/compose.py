"""Compose: a recipe file and overrides become a Plan of validated parts, or one error that lists every mistake."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ValidationError

from kilotune.core.errors import IncompatibleError, RecipeError
from kilotune.core.method import Method
from kilotune.core.registry import find, names, nearest
from kilotune.engine.composing.clashes import clashes, mode_problems
from kilotune.engine.composing.plan import Plan
from kilotune.engine.composing.recipe import PARTS, SECTIONS, ClientGroup, Recipe, Spec

Mode = Literal["federate", "tune"]


def shipped() -> list[str]:
    """Names of the recipes that come with kilotune."""
    return sorted(p.name[:-5] for p in files("kilotune.recipes").iterdir() if p.name.endswith(".yaml"))


def read(recipe: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file, or in the shipped recipe of that name."""
    path = Path(recipe)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{recipe}: cannot be read as text ({error}).") from None
    elif str(recipe) in shipped():
        text = files("kilotune.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"recipe: got {str(recipe)!r}, expected a file or one of {', '.join(shipped())}."
            f"{nearest(str(recipe), shipped())}"
        )
    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the same, but compiled
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{recipe}:{mark.line + 1}" if mark else str(recipe)
        raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{recipe}: got {type(content).__name__}, expected a mapping of keys to values.")
    return content


def override(content: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The recipe with `section.key=value` assignments applied; values are YAML, nothing after the = is empty text."""
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            problems.append(f"--set {assignment}: expected KEY=VALUE, e.g. optimizer.lr=1e-3.")
            continue
        *path, last = key.split(".")
        target = content
        for depth, part in enumerate(path):
            inner = target.get(part)
            if isinstance(inner, str) and depth == 0 and part in PARTS:
                inner = {"name": inner}
            if inner is None:
                inner = {}
            if not isinstance(inner, dict):
                problems.append(f"--set {assignment}: {'.'.join(path[: depth + 1])} is a value, not a section.")
                break
            target[part] = dict(inner)
            target = target[part]
        else:
            try:
                target[last] = yaml.safe_load(text) if text else ""
            except yaml.YAMLError as error:
                problems.append(f"--set {assignment}: not YAML: {getattr(error, 'problem', error)}.")
    if problems:
        raise RecipeError(*problems)
    return content


def compose(recipe: str | Path, mode: Mode, assignments: list[str] | None = None) -> Plan:
    """Read, override, validate and build. Raises RecipeError with every mistake, one line each."""
    return build(override(read(recipe), assignments or []), mode)


def build(content: dict[str, Any], mode: Mode) -> Plan:
    """A Plan from plain data."""
    problems: list[str] = []
    content = {k: v for k, v in content.items() if v is not None}
    for key in PARTS:
        if isinstance(content.get(key), str):
            content[key] = {"name": content[key]}
    recipe = _recipe(content, problems)
    parts = _parts(content, mode, problems)
    if recipe is not None:
        problems += mode_problems(recipe, mode, parts["parametrization"])
    if problems or recipe is None:
        raise RecipeError(*problems)
    plan = Plan(recipe=recipe, **parts)
    found = clashes(plan)
    for group in () if found else recipe.clients:  # which would have the same faults
        follower = _with_group(plan.resolved(), group)
        found += clashes(build({**follower, "clients": ()}, mode))
    if found:
        raise IncompatibleError(*dict.fromkeys(found))
    return plan


def for_group(plan: Plan, index: int) -> Plan:
    """The plan as clients of one group follow it; -1: of none."""
    if index < 0:
        return plan
    return build(_with_group(plan.resolved(), plan.recipe.clients[index]), "federate")


def _with_group(content: dict[str, Any], group: ClientGroup) -> dict[str, Any]:
    changes = {k: getattr(group, k) for k in ("estimator", "optimizer", "local_steps", "batch_size", "precision")}
    kind = content["parametrization"]
    sizes = {k: v for k in ("rank", "ranks") if (v := getattr(group, k)) is not None and k in kind}
    changes["parametrization"] = {**kind, **sizes} if sizes else None
    return {**content, **{k: v for k, v in changes.items() if v is not None}, "clients": ()}


def _recipe(content: dict[str, Any], problems: list[str]) -> Recipe | None:
    unknown = [key for key in content if key not in Recipe.model_fields]
    problems += [f"{key}: no such key.{nearest(str(key), list(Recipe.model_fields))}" for key in unknown]
    known = {key: value for key, value in content.items() if key in Recipe.model_fields}
    specs = {k: v for k, v in known.items() if k in PARTS}
    for key, value in specs.items():
        if not isinstance(value, dict):
            problems.append(f"{key}: got {value!r}, expected a name or a mapping with one.")
            known.pop(key)
    try:
        return Recipe.model_validate(known)
    except ValidationError as error:
        problems += describe("", error, Recipe)
        return None


def _defaults(content: dict[str, Any], mode: Mode) -> dict[str, Spec | None]:
    """What an absent part means; docs/recipes.md lists this table."""
    name = (content.get("parametrization") or {}).get("name", "subspace")
    coefficients = name == "subspace"
    return {
        "parametrization": {"name": "subspace"},
        "basis": {"name": "tiled"} if coefficients else None,
        "estimator": {"name": "backprop"},
        "optimizer": {"name": "adamw", "lr": 2e-2 if coefficients else 1e-3},
        "uplink": {"name": "coefficients", "dtype": "int8"} if coefficients else {"name": "dense", "dtype": "fp16"},
        "downlink": {"name": "coefficients", "dtype": "int16"} if coefficients else {"name": "dense", "dtype": "fp16"},
        "aggregation": {"name": "mean"},
        "server_optimizer": {"name": "sgd", "lr": 1.0},
        "schedule": {"name": "all"},
        "partition": None,
        "privacy": None,
    }


def _parts(content: dict[str, Any], mode: Mode, problems: list[str]) -> dict[str, Any]:
    defaults = _defaults(content, mode)
    parts: dict[str, Any] = {}
    for key, kind in PARTS.items():
        spec = content.get(key, defaults[key])
        parts[key] = None
        if isinstance(spec, dict):
            try:
                parts[key] = method(kind, spec, key)
            except RecipeError as error:
                problems += error.problems
    if isinstance(content.get("basis"), dict) and parts["parametrization"] and not parts["parametrization"].uses_basis:
        problems.append(
            f"basis: has no effect with parametrization {parts['parametrization'].method_name()!r}. "
            "Remove it, or use parametrization: subspace."
        )
    return parts


def method(kind: str, spec: Spec, where: str) -> Method:
    """One part from its mapping. Raises RecipeError with every mistake in it."""
    values = dict(spec)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where}.name: missing, expected one of {', '.join(names(kind))}.")
    cls = find(kind, name, f"{where}.name")
    try:
        return cast(Method, cls.model_validate(values))
    except ValidationError as error:
        raise RecipeError(*describe(where, error, cls)) from None


def describe(where: str, error: ValidationError, model: type[BaseModel]) -> list[str]:
    """pydantic's findings in our one form: place, value, constraint, nearest name."""
    lines = []
    choices: dict[str, str] = {}  # a value that may be of several kinds is found wrong once for each
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        if where:
            path = path[:1]  # fields of methods are flat; below them come pydantic's names for the kinds of a value
        place = ".".join([where, *path] if where else path)
        owner = SECTIONS.get(path[0], model) if len(path) > 1 else model
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: no such key.{nearest(path[-1], list(owner.model_fields))}")
        elif item["type"] == "missing":
            lines.append(f"{place}: missing.")
        else:
            wanted = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            start = f"{place}: got {item['input']!r}, expected "
            choices[start] = f"{choices[start]}, or {wanted}" if start in choices else wanted
    return lines + [f"{start}{wanted}." for start, wanted in choices.items()]
