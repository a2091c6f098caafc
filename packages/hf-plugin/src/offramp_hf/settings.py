"""Settings of offramp on the command line: the `early_exit` dict of a config, as JSON or in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import offramp
from offramp.checkpoint import read_bytes
from offramp.enable import make_policy, parse_flag
from offramp.errors import BadArgument, OfframpError
from offramp.options import Options
from offramp.policy import ExitPolicy

#: options whose value says enough without their name
PLAIN = ("threshold", "depth", "patience")


@dataclass(frozen=True)
class Setting:
    """One way to run offramp, as the config flag says it. text: what was given, for messages; exits: the directory that
    the dict names, or None.
    """

    text: str
    config: dict[str, Any]
    options: Options
    exits: str | None = None

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read a JSON object, or a file that holds one; raises `BadArgument` with the setting in the message."""
        try:
            flag = json.loads(text if text.lstrip().startswith("{") else read_bytes(Path(text)))
        except (ValueError, OfframpError) as error:
            raise BadArgument(
                f"--setting {text!r} is neither a JSON object nor a file of one ({error}); write e.g. "
                f'--setting \'{{"policy": "confidence", "threshold": 0.3, "verify": true}}\''
            ) from error
        return cls.of(flag, text)

    @classmethod
    def of(cls, flag: Any, text: str = "") -> Setting:
        """Take an `early_exit` dict; raises `BadArgument` with the setting in the message."""
        try:
            return cls(text or json.dumps(flag), *parse_flag(flag))
        except OfframpError as error:
            raise BadArgument(f"setting {text or flag}: {error}") from error

    @property
    def name(self) -> str:
        """A short label, e.g. "fixed 3 verify draft confident eta=0.6"."""
        words = [self.config["policy"], *_words({k: v for k, v in self.config.items() if k != "policy"})]
        if self.options.verify:
            words.append("verify")
        draft: Any = self.options.draft
        if isinstance(draft, Mapping):
            words += ["draft", str(draft.get("rule")), *_words({k: v for k, v in draft.items() if k != "rule"})]
        elif draft is not None:
            words += ["draft", str(draft)]
        if (some := self.options.draft_vocabulary) is not None:
            words.append(f"vocabulary={some if isinstance(some, int) else len(some)}")
        if not self.options.verify and self.options.kv != "catch_up":
            words.append(self.options.kv)
        return " ".join(words)

    def enabled(self) -> dict[str, Any]:
        """Return the options for `offramp.enable`."""
        return asdict(self.options)

    def policy(self, exits: Any) -> ExitPolicy:
        """Return the policy, once it has been enabled on these exits; raises `BadArgument` with the setting in it."""
        try:
            made = make_policy(self.config, exits.at)
            with offramp.enable(exits.model, made, **self.enabled()):
                pass
        except OfframpError as error:
            raise BadArgument(f"setting {self.text}: {error}") from error
        return made


def parse_all(texts: Sequence[str]) -> list[Setting]:
    """Read several settings; raises `BadArgument` when two would have the same row."""
    found = [Setting.parse(text) for text in texts]
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadArgument(f"--setting {twice[0]!r} is given twice; leave one out")
    return found


def _words(options: Mapping[str, Any]) -> list[str]:
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    return [_short(v) if k in PLAIN else f"{k}={_short(v)}" for k, v in given.items()]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(_short(v) for v in value)
    if isinstance(value, Mapping):
        return (
            "(" + " ".join([str(value.get("policy")), *_words({k: v for k, v in value.items() if k != "policy"})]) + ")"
        )
    return f"{value:g}" if isinstance(value, float) else str(value)
