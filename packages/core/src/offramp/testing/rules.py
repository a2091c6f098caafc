"""The contract of a draft rule, as a function to call from a test: `check_rule(MyRule())`."""

from __future__ import annotations

from offramp._registry import draft_from
from offramp.draft import Drafter, DraftRule, Look, Outcome, Plan, Setup, Shadow
from offramp.errors import BadArgument
from offramp.testing import require

DEPTHS, DEPTH = (2, 4, 6), 8


def check_rule(rule: DraftRule) -> None:
    """Raise `ContractError` unless `rule` keeps every rule of `DraftRule`.

    Frozen and hashable; its config builds it again; too few exits are refused; plans stay inside the room and the open
    exits; what it proposes fits; it learns from any outcome, also of a round without drafts, and starts afresh.
    """
    settings = getattr(rule, "__dataclass_params__", None)
    require(settings is not None and settings.frozen, rule, "must be a frozen dataclass")
    require(draft_from(rule.config()) == rule and hash(draft_from(rule.config())) == hash(rule), rule, "config differs")
    try:
        rule.check(DEPTHS[: rule.exits - 1], "tied", False)
        require(rule.exits == 0, rule, f"must refuse fewer than {rule.exits} exits")
    except BadArgument:
        pass
    rule.check(DEPTHS, "tied", False)
    for levels in ((0, 1, 2), (1, 2)):
        drafter = rule.start(Setup(DEPTHS, DEPTH, levels, head=0.2, wider=0.02))
        require(drafter is not rule.start(Setup(DEPTHS, DEPTH, levels)), rule, "start must return a new drafter")
        for rows in (1, 3):
            drafter.begin(rows)
            for turn in range(30):
                text = ([1, 2, 3] * 20)[: 5 + 2 * turn]
                _round(rule, drafter, [text] * rows, room=turn % 5 + 1, levels=levels, right=turn % 3)


def _round(
    rule: DraftRule, drafter: Drafter, texts: list[list[int]], room: int, levels: tuple[int, ...], right: int
) -> None:
    rows = len(texts)
    given = drafter.propose(texts, room) if rule.reads else []
    require(all(len(row) <= room for row in given), rule, f"proposes more than the room of {room}")
    looks: list[Look] = []
    plan = Plan((), 0) if any(given) else drafter.plan(room)
    require(plan.length <= room, rule, f"plans {plan.length} drafts in a room of {room}")
    require(set(plan.levels) <= set(levels), rule, f"asks exits {plan.levels} of the open {levels}")
    require(set(plan.levels) <= set(drafter.levels), rule, f"asks exits {plan.levels}, not in its levels")
    require(plan.width == 1 or rule.branches, rule, "plans a tree and does not say so (branches)")
    require(not plan.shadow or rule.shadows, rule, "asks for shadows and does not say so (shadows)")
    live = list(range(rows))
    for place in range(plan.length if plan.levels else 0):
        look = Look(plan.levels[0], place, [0.9] * rows, [place] * rows, [True] * rows)
        looks.append(look)
        look.drafted = bool(drafter.wants(look, live))
        if not look.drafted or not drafter.goes_on(look, live):
            break
    drafts = max((len(row) for row in given), default=0) if any(given) else sum(look.drafted for look in looks)
    kept = min(drafts, right) + 1
    tokens = list(range(kept))
    shadows = [Shadow(level, tokens, [0.5] * kept) for level in range(3)] if plan.shadow else []
    for row in live:
        drafter.learn(Outcome(row, tokens, drafts, kept, looks, shadows, any(given)))
