"""Find things by name: a built-in is the file of that name in its kind's folder; third parties use an entry point."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from offramp import calibrator, draft, gate, head, kernels, loss, policy
from offramp.errors import BadArgument, OfframpError, UnknownName, check_options, did_you_mean

T = TypeVar("T")

#: kind -> folders searched for `<name>.py`; plugins add theirs with `add_folder`
_folders: dict[type, list[str]] = {
    policy.ExitPolicy: ["offramp.policies"],
    head.ExitHead: ["offramp.heads"],
    calibrator.Calibrator: ["offramp.calibrators"],
    loss.Loss: ["offramp.losses"],
    gate.ExitGate: ["offramp.gates"],
    draft.DraftRule: [],  # drafting is decoding: the rules come with the plugin that decodes
}
_classes: dict[tuple[type, str], type] = {}


def kinds() -> tuple[type, ...]:
    """Return the contracts that have names."""
    return tuple(_folders)


def add_folder(kind: type, package: str) -> None:
    """Let files of `package` be found as `kind` too; a plugin calls this once, at import."""
    folders = _folders.setdefault(kind, [])
    if package not in folders:
        folders.append(package)


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the class available as `name` under the contract it subclasses.

    Raises `OfframpError` when another class already has the name, with both full paths.
    """

    def keep(cls: type[T]) -> type[T]:
        kind = next((k for k in _folders if issubclass(cls, k)), None)
        if kind is None:
            raise OfframpError(f"{cls.__qualname__} subclasses none of {', '.join(k.__name__ for k in _folders)}")
        other = _classes.get((kind, name))
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise OfframpError(
                f"two classes claim the {kind.__name__} name {name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one"
            )
        cls.name = name  # type: ignore[attr-defined]
        _classes[kind, name] = cls
        return cls

    return keep


def _files(package: str) -> list[str]:
    module = importlib.import_module(package)
    return [m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_")]


def names(kind: Any) -> list[str]:
    """Return the sorted names known for a contract: files of its folders and registered third-party classes; for the
    module `offramp.kernels` those of its ops.
    """
    if kind is kernels:
        return kernels.ops()
    from offramp._plugins import plugins

    plugins()  # they bring folders and classes of their own
    if kind not in _folders:
        raise UnknownName(f"{kind!r} has no names;{did_you_mean(kind, (k.__name__ for k in _folders))}")
    found = {stem for package in _folders[kind] for stem in _files(package)}
    return sorted(found | {name for k, name in _classes if k is kind})


def lookup(kind: type, name: str) -> Any:
    """Return the class registered as `name`; imports only its own file. Raises `UnknownName`."""
    if not isinstance(name, str):
        raise UnknownName(f"a {kind.__name__} is named by a string, not by {name!r};{did_you_mean(name, names(kind))}")
    if not _import(kind, name):  # other people's code is imported only when the name is not a built-in
        from offramp._plugins import plugins

        plugins()
        _import(kind, name)
    if (kind, name) not in _classes:
        raise UnknownName(f"no {kind.__name__} is called {name!r};{did_you_mean(name, names(kind))}")
    return _classes[kind, name]


def _import(kind: type, name: str) -> bool:
    """Import the file called `name`, if there is one and it is needed; returns whether the class is there now."""
    if (kind, name) not in _classes:
        for package in _folders.get(kind, []):
            if name in _files(package):
                importlib.import_module(f"{package}.{name}")
                break
    return (kind, name) in _classes


def create(kind: type, name: str, **config: Any) -> Any:
    """Build the object registered as `name`; an unknown option raises `UnknownName` with the options that exist."""
    cls = lookup(kind, name)
    check_options(config, inspect.signature(cls).parameters, f"{kind.__name__} {name!r}")
    try:
        return cls(**config)
    except TypeError as error:
        known = ", ".join(str(p) for p in inspect.signature(cls).parameters.values())
        raise UnknownName(f"{kind.__name__} {name!r} takes ({known}): {error}") from error


def policy_from(config: dict[str, Any]) -> policy.ExitPolicy:
    """Build a policy from what `ExitPolicy.config()` returned; wrapped policies are nested dicts."""

    def build(value: Any) -> Any:
        if isinstance(value, dict) and "policy" in value:
            return policy_from(value)
        return [build(v) for v in value] if isinstance(value, list) else value

    if "policy" not in config:
        raise BadArgument(f'a policy\'s config names it under "policy", e.g. {{"policy": "never"}}; got {config!r}')
    options = {k: build(v) for k, v in config.items() if k != "policy"}
    built: policy.ExitPolicy = create(policy.ExitPolicy, config["policy"], **options)
    return built


def draft_from(given: Any) -> draft.DraftRule:
    """Return the draft rule that `enable(draft=...)` names.

    None: "adaptive"; a number: at most so many drafts from the first exit that the policy accepts ("dssd"); a name; a
    dict {"rule": name, option: value}; or a rule. Raises `BadArgument`, `UnknownName`.
    """
    if isinstance(given, draft.DraftRule):
        return given
    if isinstance(given, (int, float)) and (isinstance(given, bool) or given < 1 or given != int(given)):
        raise BadArgument(f"draft={given!r} must be a positive number of tokens, or None to adapt")
    if given is None:
        found: draft.DraftRule = create(draft.DraftRule, "adaptive")
    elif isinstance(given, (int, float)):
        found = create(draft.DraftRule, "dssd", length=int(given))
    elif isinstance(given, str):
        found = create(draft.DraftRule, given)
    elif isinstance(given, Mapping) and isinstance(given.get("rule"), str):
        found = create(draft.DraftRule, given["rule"], **{k: v for k, v in given.items() if k != "rule"})
    else:
        raise BadArgument(
            f"draft={given!r} is no draft rule; give a name of offramp.names(offramp.DraftRule), a number of tokens, "
            f'or {{"rule": "fixed", "length": 4}}'
        )
    return found
