"""Training through the Hugging Face Trainer; run as a script, this file is one process of a distributed run."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import offramp
from offramp._registry import create
from offramp.errors import BadArgument, DamagedFile, NotAttached
from offramp_hf.heads.lora import ADAPTER
from offramp_hf.trainer import ExitTraining, gathered, train

LENGTH = 8


def tiny():
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    # wide weights: with the usual 0.02 gradients are so small that Adam turns rounding into steps of 3e-5
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4, pad_token_id=0, initializer_range=0.2)).eval()


def attached(head="lora", gate=None):
    model = tiny()
    torch.manual_seed(1)
    return model, offramp.attach(model, at=[1, 2], head=head, gate=gate)


def rows(n=24):
    """Sequences of uneven length, so that a mean of the processes' means is not the mean over all tokens."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(n):
        ids = torch.randint(1, 61, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < 2 + i % 7).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def arguments(folder, batch, **more):
    options = {
        "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", **more,
    }  # fmt: skip
    return TrainingArguments(str(folder), per_device_train_batch_size=batch, **options)


def test_trains_only_the_heads_and_reports(tmp_path, capsys):
    model, exits = attached()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    report = train(model, rows(), arguments(tmp_path, 4, max_steps=8), eval_dataset=rows(10))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert changed == {n for n, _ in model.named_parameters() if n.startswith("exits.")}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not model.training
    assert len(report.losses) == 8
    assert report.losses[-1] < report.losses[0]
    assert report.before.keys() == report.agreement.keys() == set(exits.at)
    with torch.no_grad():
        seen = exits.backbone.observe({k: torch.stack([r[k] for r in rows(10)]) for k in rows(1)[0]}, exits.at)
        final = model.lm_head(model.model.norm(seen.final)).argmax(-1)
        share = (exits[2](seen.hidden[1]).argmax(-1) == final).float().mean().item()
    assert report.agreement[2] == pytest.approx(share)


def test_gates_are_trained_alone(tmp_path):
    model, exits = attached("speculative")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = train(model, rows(), arguments(tmp_path, 4), loss="speculative_gate", eval_dataset=rows(10))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, _ in model.named_parameters() if ".exit_gate." in n}
    assert report.before == report.agreement and set(report.agreement) == {1, 2} and exits[1].trained


def test_the_gate_of_all_exits_is_trained_alone(tmp_path):
    model, exits = attached("speculative", gate="linear")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = train(model, rows(), arguments(tmp_path, 4), loss="gate", eval_dataset=rows(10))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"exits.gate.weight", "exits.gate.bias"} and report.before == report.agreement
    assert len(report.losses) and not exits[1].trained


def labelled(n=24):
    """Sequences whose labels are their own next tokens."""
    return [{**row, "labels": torch.where(row["attention_mask"] > 0, row["input_ids"], -100)} for row in rows(n)]


@pytest.mark.parametrize(("loss", "gate"), [("ponder", "lambda"), ("joint_exit", "jei")])
def test_heads_and_the_gate_beside_them_are_trained_together(tmp_path, loss, gate):
    model, exits = attached("linear", gate=gate)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = train(model, labelled(), arguments(tmp_path, 4, max_steps=12), loss=loss, eval_dataset=labelled(8))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {n for n, _ in model.named_parameters() if n.startswith("exits.")}
    assert len(report.losses) == 12 and exits.gate == gate


def test_phases_come_in_turn(tmp_path):
    """The gate's weights stand still in the warm-up and while heads are trained, as the Trainer's steps say."""
    model, exits = attached("linear", gate="jei")
    seen, loss = [], create(offramp.Loss, "joint_exit")

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            seen.append((exits.gate_module.weight.clone(), exits[1].proj.weight.clone()))

    options = arguments(tmp_path, 4, max_steps=10)
    train(model, labelled(), options, loss=loss, trainer={"callbacks": [Watch()]})
    phases = [loss.phase(step, 10) for step in range(10)]
    assert phases[1:] == [*["warmup"], *["heads"] * 2, *["gates"] * 2, *["heads"] * 2, *["gates"] * 2]
    for step in range(1, 10):
        gate, head = (not torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert (gate, head) == ((True, False) if phases[step] == "gates" else (False, True)), step


def test_a_loss_that_needs_another_gate_is_refused(tmp_path):
    model, _ = attached("linear", gate="linear")
    with pytest.raises(NotAttached, match='gate="lambda"'):
        train(model, labelled(), arguments(tmp_path, 4), loss="ponder")
    with pytest.raises(BadArgument, match="trains the model itself"):
        train(model, labelled(), arguments(tmp_path, 4), loss="equilibrium")


def test_a_loss_that_trains_the_model_is_refused(tmp_path):
    model, _ = attached()
    with pytest.raises(BadArgument, match="trains the model itself.*offramp.fit"):
        train(model, rows(), arguments(tmp_path, 4), loss="layerwise_distill")


def test_a_checkpoint_is_an_exits_directory_and_training_resumes_from_it(tmp_path):
    model, exits = attached()
    train(model, rows(), arguments(tmp_path, 4, save_strategy="steps", save_steps=2))
    folder = tmp_path / "checkpoint-2"
    assert {"exits.json", "adapter_model.safetensors"} <= set(os.listdir(folder))
    assert not {"model.safetensors", "pytorch_model.bin"} & set(os.listdir(folder))
    again = tiny()
    resumed = offramp.load(again, folder)
    train(again, rows(), arguments(tmp_path, 4), resume_from_checkpoint=str(folder))
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert resumed.at == exits.at
    other = tiny()
    offramp.attach(other, at=[1, 3], head="lora")
    with pytest.raises(DamagedFile, match=r"\[1, 2\]"):
        train(other, rows(), arguments(tmp_path, 4), resume_from_checkpoint=str(folder))


def test_true_labels_and_options_reach_the_loss(tmp_path):
    model, _ = attached("tied")
    data = [{**r, "labels": r["input_ids"].masked_fill(r["attention_mask"] == 0, -100)} for r in rows()]
    report = train(model, data, arguments(tmp_path, 4), loss="labels", weighting="linear")
    assert len(report.losses) == 4
    with pytest.raises(BadArgument, match="weighing"):
        train(model, data, arguments(tmp_path, 4), loss="labels", weighing="linear")
    with pytest.raises(BadArgument, match="dataset=None"):
        train(model, None, arguments(tmp_path, 4))
    with pytest.raises(NotAttached, match="offramp.attach"):
        train(tiny(), data, arguments(tmp_path, 4))


def test_flags_come_back_after_an_exception(tmp_path):
    model, _ = attached("tied")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(BadArgument, match="labels"):  # no labels in the data
        train(model, rows(), arguments(tmp_path, 4), loss="labels")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_a_batch_without_rows_gives_zero_and_gradients():
    model, exits = attached("tied")
    training = ExitTraining(model).train()
    assert not model.model.training
    assert exits.modules.training
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    loss = training(**batch, column_the_model_does_not_take=torch.ones(1))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert exits[1].exit_norm.weight.grad.abs().sum() == 0
    assert isinstance(training, nn.Module)


def worker(folder, **more):
    """Train on this process's share, 8 rows per step over all processes, and save from the main one."""
    warnings.simplefilter("ignore")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model, exits = attached()
    report = train(model, rows(), arguments(folder, 8 // world, save_strategy="steps", save_steps=4, **more))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(folder, "losses").write_text(" ".join(map(str, report.losses)))
    return exits


def heads_gradients(shard):
    """Return the exits, and their gradients on 8 sequences, as one process or two with all sharded (FSDP2)."""
    model, exits = attached()
    torch.manual_seed(5)
    for depth in exits:
        nn.init.normal_(exits[depth].proj.lora_B[ADAPTER].weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("exits."))
    training, data = ExitTraining(model).train(), rows(8)
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(training, mesh=mesh)
        data = data[dist.get_rank() * 4 :][:4]
    training(**{k: torch.stack([row[k] for row in data]) for k in data[0]})["loss"].backward()
    whole = {n: p.grad.full_tensor() if shard else p.grad for n, p in exits.modules.named_parameters()}
    return exits, whole


def sharded(folder):
    """Save the gradients and the gathered weights of sharded heads from the main process."""
    exits, gradients = heads_gradients(shard=True)
    with gathered(exits):
        if dist.get_rank() == 0:
            exits.save(folder / "sharded")
            save_file(gradients, folder / "gradients")


def launch(folder, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_the_same_heads_as_one(tmp_path):
    launch(tmp_path / "two")
    worker(tmp_path / "one")
    start = attached()[1]
    offset = 0.0
    for name in ("adapter_model.safetensors", "exits.safetensors"):
        one, two = (load_file(tmp_path / side / "checkpoint-4" / name) for side in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)
        offset += sum(v.abs().sum().item() for k, v in one.items() if "lora_B" in k)
    assert offset > 1  # it did train: B starts at zero
    assert start.at == (1, 2)
    losses = [list(map(float, Path(tmp_path, side, "losses").read_text().split())) for side in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    exits, gradients = heads_gradients(shard=False)
    torch.testing.assert_close(load_file(tmp_path / "two" / "gradients"), gradients, rtol=1e-5, atol=1e-5)
    loaded = offramp.load(tiny(), tmp_path / "two" / "sharded")
    torch.testing.assert_close(loaded.modules.state_dict(), exits.modules.state_dict(), rtol=0, atol=0)


if __name__ == "__main__":
    worker(sys.argv[1])
    sharded(Path(sys.argv[1]))
    dist.destroy_process_group()
    # a thread of gloo that still holds a tensor when the interpreter goes asks for its lock and aborts (seen once)
    os._exit(0)
