"""Modules recorded as plain lists of tensor operations, and replayed without the Python around them."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module

from offramp.kernels import mode
from offramp.kernels.linear import in_cpp
from offramp_hf.backbones._quick import QuickNorm

#: calls of one shape before it is recorded: that takes some 15 ms, and a call saves 0.1 ms
USES = 64
#: recordings of one shape, over all parts and calls of `generate`, before it is given up; each costs some 15 ms
TRIES = 8

#: a function of tensors that gives a tensor or a tuple of them
Function = Callable[..., Any]
#: a recording and the weights that it takes behind the tensors of the call
Step = tuple[Function, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Example:
    """A call to record. function: of `inputs`, and nothing else but the weights of the part; other: inputs of the same
    kind to record with, of other sizes where sizes may differ within a shape, so that a recording that knows them
    shows; kind: calls of the same kind run the same Python code, and that it does not depend on values is checked for
    one of them (30 ms).
    """

    function: Function
    inputs: Sequence[Tensor]
    other: Sequence[Tensor]
    kind: Any = None


class Replay:
    """Runs parts of a model from recordings where these give what the part gives, to the bit.

    A block of a small model spends more time between its tensor operations than in them: 0.25 ms against 0.16 ms
    replayed, at 5 M parameters on a CPU. A recording is made once per shape and shared by all parts it fits, after a
    real call of each was compared; in every generation one call of each part is compared again. Nothing is recorded
    where hooks, patches, autocast or compilation act on a part, nor where what runs depends on values; nor on devices
    that run behind the calls, where comparing would wait for them and nobody has measured what it saves. What was
    proved so multiplies in C++ with compile=True or OFFRAMP_KERNELS=cpp.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = parts
        self.graphs: dict[Any, list[Function]] = {}
        #: the recording that a part was found equal to, by shape
        self.proved: dict[Any, list[Function | None]] = {}
        self.uses: Counter[Any] = Counter()
        self.tries: Counter[Any] = Counter()
        #: calls that were made to learn from: slower than what comes after them
        self.learned = 0
        #: why shapes were given up, by shape
        self.refused: dict[Any, str] = {}
        #: copies of recordings that multiply in C++, by recording
        self.quick: dict[Function, Function] = {}
        #: what of recordings writes into tensors that they are given, by recording
        self.writes: dict[Function, Function] = {}
        #: (part, kind) that was found not to depend on values
        self.steady: set[tuple[int, Any]] = set()
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}  # a copied model records its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["parts"])  # type: ignore[misc]

    def begin(self, compiled: bool = False) -> None:
        """A generation begins: weights, adapters and hooks may be others than in the last. compiled: multiply in C++,
        whatever OFFRAMP_KERNELS says."""
        self.steps: dict[Any, list[Step | None]] = {}
        self.cpp = compiled or mode() == "cpp"
        #: parts of which a call was compared in this generation
        self.checked: set[int] = set()
        cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        self.off = cast or hooked(self.parts) or any(w.device.type != "cpu" for p in self.parts for w in weights(p))

    def ready(self, shape: Any) -> list[Step | None]:
        """Return what runs calls of this shape, part by part; None: ask `find`."""
        found = self.steps.get(shape)
        if found is None:
            found = self.steps[shape] = [None] * len(self.parts)
        return found

    def find(self, index: int, shape: Any) -> Step | None:
        """Return what runs calls of this shape of a part, None when the part itself has to."""
        proved = self.proved.get(shape)
        # what changes between generations (weights are read anew) shows in calls of any shape
        graph = proved[index] if proved is not None and index in self.checked else None
        if graph is None:
            return None
        own = weights(self.parts[index])
        step = self.ready(shape)[index] = self.quickest(graph, own), own
        return step

    def quickest(self, graph: Function, own: tuple[Tensor, ...]) -> Function:
        """Return what runs for a recording that was proved: itself, or its copy that multiplies in C++, which is equal
        to rounding; own: the weights, of which kinds that are more than numbers multiply themselves."""
        if not self.cpp or any(type(w) not in (Tensor, nn.Parameter) for w in own):
            return graph
        if graph not in self.quick:
            self.quick[graph] = in_cpp(graph)
        return self.quick[graph]

    def writing(self, index: int, shape: Any) -> Step | None:
        """Return what of `find` writes into tensors that it is given, such as keys and values, and does nothing else.
        """
        step = self.ready(shape)[index] or self.find(index, shape)
        if step is None:
            return None
        if step[0] not in self.writes:
            self.writes[step[0]] = _writing(step[0])
        return self.writes[step[0]], step[1]

    def learn(self, index: int, shape: Any, out: Any, make: Callable[[], Example]) -> None:
        """Take in that a call of a part gave `out`; make: what the call was."""
        if self.off or shape in self.refused:
            return
        self.learned += 1
        self.uses[shape] += 1
        if self.uses[shape] < USES:
            return
        example, own = make(), weights(self.parts[index])
        proved = self.proved.setdefault(shape, [None] * len(self.parts))
        known = self.graphs.setdefault(shape, [])
        before, inputs = proved[index], (*example.inputs, *own)
        proved[index] = next((g for g in known if _same(g, out, inputs)), None)
        if proved[index] is None:
            if before is not None:  # it fitted once: the part runs other code now, in all shapes
                self.forget(index)
            proved[index] = self.record(index, shape, out, example)
        graph = proved[index]
        if graph is not None:
            self.checked.add(index)
            self.ready(shape)[index] = self.quickest(graph, own), own

    def forget(self, index: int) -> None:
        """Take nothing as proved for a part."""
        for proved in self.proved.values():
            proved[index] = None
        for steps in self.steps.values():
            steps[index] = None

    def record(self, index: int, shape: Any, out: Any, example: Example) -> Function | None:
        """Return a new recording of a part that gives `out`, or None."""
        self.tries[shape] += 1
        if self.tries[shape] > TRIES:
            self.refused[shape] = "its recordings keep differing from it"
            return None
        part = self.parts[index]
        try:
            graph = _record(part, example, check=(index, example.kind) not in self.steady)
        except Exception as error:  # noqa: BLE001  (whatever cannot be recorded, the part itself runs)
            self.refused[shape] = f"{type(error).__name__}: {error}"
            return None
        self.steady.add((index, example.kind))
        if not _same(graph, out, (*example.inputs, *weights(part))):
            return None
        self.graphs[shape].append(graph)
        return graph


def _record(part: nn.Module, example: Example, check: bool) -> Function:
    """Return the example's function, of its inputs and the weights of the part; raises where it cannot be one.

    check: whether to refuse what depends on values.
    """
    count = len(example.other)

    def step(*given: Tensor) -> Any:
        with _swapped(part, given[count:]):
            return example.function(*given[:count])

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants is meant: a recording is for one shape
        inputs = [t.detach().clone() for t in example.other] + [w.detach() for w in weights(part)]
        if check:  # no fake tensor has a value
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, _unlogged("torch._subclasses.fake_tensor"):
                step(*[fake.from_tensor(t) for t in inputs])
        graph: Any = torch.jit.trace(step, tuple(inputs), check_trace=False)
    pairs = zip(example.other, example.inputs, strict=True)
    free = {mine for a, b in pairs for mine, real in zip(a.shape, b.shape, strict=True) if mine != real}
    _settle_sizes(graph.graph, free)
    found: Function = graph
    return found


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Let a logger rest: what it calls a failure is the answer to a question here."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _settle_sizes(graph: Any, free: set[int]) -> None:
    """Make constants of the sizes that a recording asks for, 5 % of a small block's time; free: those that may change.

    A size that equals one of `free` by chance stays a question; one that must not be a constant after all makes a
    recording that differs from the part, which is found out.
    """
    for node in list(graph.findAllNodes("aten::size")):
        sizes = node.inputsAt(0).type().sizes()
        size = None if sizes is None else sizes[node.inputsAt(1).toIValue()]
        if size is not None and size not in free:
            with graph.insert_point_guard(node):
                constant = graph.insertConstant(size)
            node.output().replaceAllUsesWith(constant)
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_peephole(graph, True)  # of shapes it would make constants of all sizes
    torch._C._jit_pass_dce(graph)


def _writing(graph: Any) -> Function:
    """Return a copy of a recording without what only its output needs: one that gives its first input back."""
    copied = graph.graph.copy()
    copied.registerOutput(next(copied.inputs()))
    copied.eraseOutput(0)
    torch._C._jit_pass_dce(copied)
    found: Function = torch._C._create_function_from_graph("writing", copied)
    return found


def _same(graph: Function, out: Any, inputs: tuple[Tensor, ...]) -> bool:
    try:
        found = graph(*inputs)
    except RuntimeError:
        return False
    if isinstance(out, Tensor):
        return torch.equal(found, out)
    return all(torch.equal(a, b) for a, b in zip(found, out, strict=True))


def _places(part: nn.Module) -> list[tuple[Any, str]]:
    """Return where a part's parameters and buffers hang: (dict of a module, name in it)."""
    kinds = [d for module in part.modules() for d in (module._parameters, module._buffers)]
    return [(owner, name) for owner in kinds for name, value in owner.items() if value is not None]


def weights(part: nn.Module) -> tuple[Tensor, ...]:
    """Return a part's parameters and buffers."""
    return tuple(owner[name] for owner, name in _places(part))


@contextmanager
def _swapped(part: nn.Module, given: Sequence[Tensor]) -> Iterator[None]:
    """Let other tensors stand for the part's parameters and buffers inside the context."""
    places = _places(part)
    before = [owner[name] for owner, name in places]
    try:
        for (owner, name), weight in zip(places, given, strict=True):
            owner[name] = weight
        yield
    finally:
        for (owner, name), weight in zip(places, before, strict=True):
            owner[name] = weight


def hooked(parts: Sequence[nn.Module]) -> bool:
    """Whether somebody hooked, patched or compiled a module of the parts: a recording would pass them by."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    for part in parts:
        for module in part.modules():
            forward = module.__dict__.get("forward")
            patched = forward is not None and not isinstance(forward, QuickNorm)
            if patched or module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
                return True
    return False
