"""How a policy is run: the options of `offramp.enable` that are not the policy's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from offramp._registry import draft_from
from offramp.errors import BadArgument

KV = ("catch_up", "propagate", "recompute", "schedule")
#: most tokens that wait to be recomputed: the bound in EE-LLM's code, where its check is commented out
WINDOW = 100


@dataclass(frozen=True)
class Options:
    """How a policy is run. verify: draft and check (lossless); draft: the draft rule, as its name, a dict {"rule":
    name, option: value}, a number of tokens, or None to let it adapt; kv: what supplies deeper keys and values when
    not verifying; window: most tokens that wait for them (None: 100 with kv="recompute", any number with "catch_up");
    strict: raise instead of falling back to the full model; rollback: surprise in nats above which an early token is
    taken back once the deep blocks have seen it (kv="catch_up", one row; arXiv 2310.05424); draft_vocabulary: tokens
    that drafts are chosen from with verify=True, as ids, or n for the first n ids, which byte-pair vocabularies give to
    frequent pieces: the unembedding is most of what a draft costs where the vocabulary is large (arXiv 2502.14856);
    compile: run blocks compiled by torch."""

    verify: bool = False
    draft: Any = None
    kv: str = "catch_up"
    window: int | None = None
    strict: bool = False
    rollback: float | None = None
    draft_vocabulary: int | tuple[int, ...] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.rollback is not None:
            self._check_rollback(self.rollback)
        if self.draft_vocabulary is not None:
            object.__setattr__(self, "draft_vocabulary", self._check_vocabulary(self.draft_vocabulary))
        for name in ("verify", "strict", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise BadArgument(f"{name}={getattr(self, name)!r} must be True or False")
        if self.kv not in KV:
            raise BadArgument(f"kv={self.kv!r} is not known; choose one of {', '.join(KV)}")
        if self.window is not None:
            if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
                raise BadArgument(f"window={self.window!r} must be a positive number of tokens, or None")
            if self.verify or self.kv not in ("catch_up", "recompute"):
                raise BadArgument(
                    f'window={self.window} bounds what waits with kv="catch_up" or kv="recompute", without verify; '
                    f"with kv={self.kv!r}, verify={self.verify} no token waits: leave window out"
                )
        elif self.kv == "recompute":
            object.__setattr__(self, "window", WINDOW)
        if self.draft is not None:
            draft_from(self.draft)  # an unknown rule or option is refused here

    def _check_vocabulary(self, given: Any) -> int | tuple[int, ...]:
        ids = given.tolist() if hasattr(given, "tolist") else given
        some = ids if isinstance(ids, (list, tuple, range)) else [ids]
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in some)
        if not whole or len(set(some)) != len(some) or not some or ids == 0:
            raise BadArgument(
                f"draft_vocabulary={str(given)[:60]} must be a number of tokens above 0, or different token ids: "
                f"draft_vocabulary=torch.bincount(ids).topk(8192).indices"
            )
        if not self.verify:
            raise BadArgument(
                "draft_vocabulary leaves tokens out of drafts, which is for verify=True; without it an exit's tokens "
                "are the answer: leave draft_vocabulary out"
            )
        return ids if isinstance(ids, int) else tuple(ids)

    def _check_rollback(self, nats: Any) -> None:
        if isinstance(nats, bool) or not isinstance(nats, (int, float)) or not 0 < nats < math.inf:
            raise BadArgument(f"rollback={nats!r} must be a number of nats above 0, or None to keep every token")
        if self.verify or self.kv != "catch_up":
            raise BadArgument(
                f'rollback={nats} takes back what the deep blocks see later, which is kv="catch_up" without verify; '
                f"this is kv={self.kv!r}, verify={self.verify}"
            )


OPTIONS = tuple(f.name for f in fields(Options))


def refuse_generation(options: Options, kind: str) -> None:
    """Raise `BadArgument` where an option of generation is given for a model that generates no tokens.

    kind: the model, and what it does instead, e.g. "ResNet answers once per image".
    """
    plain = Options()
    for name in OPTIONS:
        if name not in ("strict", "compile") and (given := getattr(options, name)) != getattr(plain, name):
            raise BadArgument(
                f"{name}={given!r} is for models that generate tokens; {kind}, so there is nothing to draft and no "
                f"cache: leave {name} out"
            )
