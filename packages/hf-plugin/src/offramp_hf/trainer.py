"""Train exits through the Hugging Face `Trainer`: its loop, logging, checkpoints, and DDP / FSDP through accelerate."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from offramp import checkpoint
from offramp._registry import create
from offramp.attach import Exits, find
from offramp.backbone import Observed
from offramp.enable import paused
from offramp.errors import BadArgument, DamagedFile
from offramp.fit import FitReport, value_of, wanted
from offramp.gating import need_gate
from offramp.loss import Loss
from offramp.stages import Stage


class ExitTraining(nn.Module):
    """A model with exits as something to train: forward(**batch) -> {"loss": scalar}; only the heads get gradients.

    The backbone runs once per batch, frozen, in eval mode and without gradients; the loss is the mean over the rows
    (tokens) of all processes, however many each of them has. In eval mode the result also holds, per sample, "hits"
    [samples, exits] and "rows" [samples]: on how many rows each exit says what the full model says.
    """

    #: tells the Trainer that the loss is a mean over one micro-batch, to be divided by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, loss: str | Loss = "distill", **options: Any) -> None:
        super().__init__()
        exits = find(model)
        self.model = model
        self.__dict__["exits"] = exits
        self.objective: Loss = create(Loss, loss, **options) if isinstance(loss, str) else loss
        if self.objective.equilibrium or self.objective.taps(exits.at, exits.backbone.depth):
            raise BadArgument(f"{self.objective} trains the model itself, the Trainer only exits; use offramp.fit")
        if self.objective.beside:
            need_gate(exits, self.objective.beside)
        #: where the training is, for losses that take turns
        self.step, self.steps = 0, 1
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what accelerate's FSDP shards as a unit
        self._takes = set(inspect.signature(model.forward).parameters) | {"labels"}

    def train(self, mode: bool = True) -> ExitTraining:
        """Set the mode of the heads; the backbone stays in eval mode, its dropout would blur the teacher."""
        super().train(mode)
        self.model.eval()
        self._exits.modules.train(mode)
        return self

    @property
    def _exits(self) -> Exits:
        return self.__dict__["exits"]  # type: ignore[no-any-return]

    def forward(self, return_loss: bool = True, **batch: Any) -> dict[str, Tensor]:
        """Return {"loss"} for one batch, with columns that the model does not take left out, as the Trainer does."""
        exits = self._exits
        with torch.no_grad(), paused(self.model):
            seen = exits.observe({k: v for k, v in batch.items() if k in self._takes})
            final = exits.backbone.context().readout(seen.final)
        inputs, rows = exits.inputs(seen), len(final)
        if rows:
            loss = value_of(exits, self.objective, inputs, final, seen, self.step, self.steps)
        else:  # a process may have no labelled row; its heads still take part in the exchange of gradients
            loss = self._nothing(inputs, final, seen)
        if self.training:
            return {"loss": loss * _share(rows, final.device)}
        answers = [exits[d](h) for d, h in zip(exits.at, inputs, strict=True)]
        return {"loss": loss, **_agreement(answers, final, seen)}

    def _nothing(self, inputs: Sequence[Tensor], final: Tensor, seen: Observed) -> Tensor:
        """Return 0, reached through everything that this loss trains."""
        exits = self._exits
        answers, *_ = self.objective.read(exits, inputs, final, seen.targets, range(len(exits)))
        said = [*answers, exits.odds(inputs, answers)] if self.objective.beside else answers
        return torch.stack([a.sum() for a in said]).sum() * 0.0


def _share(rows: int, device: torch.device) -> Tensor | float:
    """Return this process's rows over the mean of all processes: what makes a mean of means the mean over all rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 1.0
    total = torch.tensor(float(rows), device=device)
    dist.all_reduce(total)
    return rows * dist.get_world_size() / total.clamp(min=1.0)


def _agreement(answers: Sequence[Tensor], final: Tensor, seen: Observed) -> dict[str, Tensor]:
    same = torch.stack([a.argmax(-1) == final.argmax(-1) for a in answers], 1).long()
    if seen.sample is None:
        return {"hits": same, "rows": torch.ones_like(same[:, 0])}
    samples = int(seen.sample.max()) + 1 if len(final) else 0
    hits = same.new_zeros(samples, same.shape[1]).index_add_(0, seen.sample, same)
    return {"hits": hits, "rows": torch.bincount(seen.sample, minlength=samples)}


class Turns(TrainerCallback):
    """Tells an `ExitTraining` where its training is."""

    def __init__(self, training: ExitTraining) -> None:
        self.training = training

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Note step and steps."""
        self.training.step, self.training.steps = state.global_step, state.max_steps


class ExitTrainer(Trainer):
    """The Trainer for exits: checkpoints are exits directories, and evaluation reports `eval_agreement_<depth>`.

    model: with exits attached; loss and options: as in `offramp.fit`; the rest: the Trainer's own. Only what
    `offramp.fit.trainable` names may require gradients; `train` below sees to that.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loss: str | Loss = "distill",
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        wrapped = ExitTraining(model, loss, **(options or {}))
        args = copy.copy(args)
        args.remove_unused_columns = False  # it looks at forward(**batch) and would remove everything
        super().__init__(model=wrapped, args=args, compute_metrics=self._metrics, **more)
        self.add_callback(Turns(wrapped))

    def _metrics(self, seen: Any) -> dict[str, float]:
        hits, rows = seen.predictions
        shares = hits.sum(0) / max(1, int(rows.sum()))
        return {f"agreement_{d}": float(s) for d, s in zip(self._exits.at, shares, strict=True)}

    @property
    def _exits(self) -> Exits:
        return self.accelerator.unwrap_model(self.model)._exits  # type: ignore[no-any-return]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an exits directory (head weights only) from the main process; every process must call it."""
        with gathered(self._exits):
            if self.args.should_save:
                self._exits.save(output_dir or self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if any(hasattr(p, "full_tensor") for p in self._exits.modules.parameters()):
            raise BadArgument(f"sharded heads cannot resume; load them first: offramp.load(model, {str(folder)!r})")
        body = checkpoint.read_index(folder)
        if (tuple(body["at"]), body["head"]) != (self._exits.at, self._exits.head):
            raise DamagedFile(f"{folder} holds {body['head']!r} exits at {body['at']}, the model has {self._exits}")
        checkpoint.restore(self._exits, folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@contextmanager
def gathered(exits: Exits) -> Iterator[None]:
    """Let sharded (FSDP2) head weights be whole on every process inside this context; all processes must enter it."""
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in exits.modules.modules():
            table: dict[str, Any] = module._parameters
            for name, value in list(table.items()):
                whole: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
                if whole is not None:
                    swapped.append((table, name, value))
                    table[name] = nn.Parameter(whole().detach(), requires_grad=value.requires_grad)
        yield
    finally:
        for table, name, value in swapped:
            table[name] = value


def train(
    model: nn.Module,
    dataset: Any,
    args: TrainingArguments,
    *,
    loss: str | Loss = "distill",
    eval_dataset: Any = None,
    resume_from_checkpoint: str | bool | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> FitReport:
    """Train the heads of `model` on `dataset` with the `Trainer`, under DDP or FSDP when launched so.

    dataset: rows as the model takes them; args: the Trainer's; eval_dataset: for the agreement before and after;
    trainer: more keywords for the Trainer (data_collator, callbacks, ...); options: the loss's. Returns a `FitReport`
    whose losses are those logged (every `args.logging_steps`). Checkpoints are exits directories:
    `offramp.load(model, "out/checkpoint-500")`. Mode and `requires_grad` are put back afterwards. Raises
    `NotAttached`, `UnknownName`, `BadArgument`.
    """
    exits = find(model)
    if dataset is None:
        raise BadArgument("dataset=None trains nothing; give rows as the model takes them")
    started, was_training = time.perf_counter(), model.training
    flags = {p: p.requires_grad for p in model.parameters()}
    report = FitReport()
    try:
        for p in flags:
            p.requires_grad_(False)
        objective: Loss = create(Loss, loss, **options) if isinstance(loss, str) else loss
        if objective.beside:
            need_gate(exits, objective.beside)
        for p in wanted(exits, Stage(objective, 1, False)):
            p.requires_grad_(True)
        more = {"train_dataset": dataset, "eval_dataset": eval_dataset, **(trainer or {})}
        runner = ExitTrainer(model, args, loss=objective, **more)
        report.before = _evaluate(runner, exits, eval_dataset)
        runner.train(resume_from_checkpoint=resume_from_checkpoint)
        report.agreement = _evaluate(runner, exits, eval_dataset)
        report.losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        model.train(was_training)
    report.seconds = time.perf_counter() - started
    return report


def _evaluate(runner: ExitTrainer, exits: Exits, data: Any) -> dict[int, float]:
    if data is None:
        return {}
    found = runner.evaluate()
    return {d: found[f"eval_agreement_{d}"] for d in exits.at}
