"""The `offramp` command line: what needs no framework is here, the rest comes from plugins as `<verb> <what>`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from offramp.errors import BadArgument, OfframpError

#: groups that plugins fill with one sub-command per kind of model, e.g. `offramp demo lm`
GROUPS = {
    "demo": "Show early exit on a real model, end to end.",
    "bench": "Measure, and print the tables of the README.",
    "fit": "Train exit heads and save them.",
    "record": "Record what every exit says on a data set.",
    "generate": "Generate with early exit.",
}
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]


class ByModel(TyperGroup):
    """A group whose sub-command need not be named where --model says which it is: `offramp fit --model timm/NAME`.

    A sub-command is for models of a kind when its own --model has a metavar that begins so: "timm/NAME".
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the sub-command in front of options that come without one; raises `BadArgument` where none is meant."""
        after = [*args[1:], ""]
        given = next((a[8:] or b for a, b in zip(args, after, strict=True) if a.split("=")[0] == "--model"), None)
        if given is not None and args[0].startswith("-"):
            args = [self._meant(ctx, given), *args]
        return super().parse_args(ctx, args)

    def _meant(self, ctx: Any, model: str) -> str:
        kind, slash, _ = model.partition("/")
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            for option in command.params if command is not None else ():
                if slash and "--model" in option.opts and str(option.metavar).startswith(kind + slash):
                    return name
        known = ", ".join(self.list_commands(ctx)) or "none: install a plugin, e.g. pip install offramp-vision"
        raise BadArgument(f"--model {model} does not say what kind of model it is; name the command ({known})")


class CleanErrors(TyperGroup):
    """Shows an `OfframpError` as one message with exit code 1; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except OfframpError as error:
            console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from error


def console(stderr: bool = False) -> Console:
    """Return a console on the present stdout or stderr."""
    return Console(stderr=stderr, highlight=False)


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    console.print(f"[bold]{escape(what)}[/]")
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/]")


def write_json(path: Path | None, body: Any) -> None:
    """Write `body` as JSON when a path was given; numbers that are not finite become null."""
    from offramp.checkpoint import write_text

    if path is not None:
        write_text(path, dump_json(body))


def dump_json(body: Any) -> str:
    """Return strict JSON: no NaN, keys as strings."""
    return json.dumps(_finite(body), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return str(value) if isinstance(value, Path) else value


def options_from(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `["threshold=0.9", "normalised=true"]` into options; values are JSON, or text where they are not."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise BadArgument(f"option {pair!r} is not NAME=VALUE; write e.g. --set threshold=0.9")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found


def depths_of(text: str) -> list[int | float]:
    """Turn "3,6,8" or "0.25,0.5" into taps; raises `BadArgument`."""
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise BadArgument(f"--at {text!r} is not a list of depths or fractions; write e.g. --at 3,6,8") from None


def told_fit(exits: Any, report: Any, folder: Path, what: str, out: Path | None) -> None:
    """Save fitted exits, say how often each agrees with the full model, and write it as JSON. what: rows are called."""
    exits.save(folder)
    for depth in exits.at:
        before, after = report.before[depth], report.agreement[depth]
        console().print(
            f"depth {depth}: agrees with the full model on {after:.1%} of held-out {what} (before: {before:.1%})"
        )
    console().print(f"wrote {escape(str(folder))} after {report.seconds:.0f} s", soft_wrap=True)
    body = {"at": list(exits.at), "head": exits.head, "before": report.before, "agreement": report.agreement}
    write_json(out, {**body, "loss": report.losses[-1], "seconds": report.seconds, "out": folder})


def told_trace(made: Any, path: Path, out: Path | None) -> None:
    """Save a trace, say what is in it, and write it as JSON."""
    made.save(path)
    console().print(f"wrote {escape(str(path))}: {escape(repr(made))}", soft_wrap=True)
    write_json(out, {"trace": path, "rows": len(made), "depths": list(made.depths), "data_hash": made.data_hash})


def group(app: typer.Typer, name: str) -> typer.Typer:
    """Return the group `name` of `app`, to which a plugin adds its sub-command; made when it is not there yet."""
    for one in app.registered_groups:
        if one.name == name and one.typer_instance is not None:
            return one.typer_instance
    made = typer.Typer(name=name, no_args_is_help=True, cls=ByModel)
    app.add_typer(made, name=name, help=GROUPS.get(name))
    return made


def build() -> typer.Typer:
    """Return the application with the commands of every plugin that works; a broken one never stops the others."""
    from offramp._plugins import plugins

    app = typer.Typer(
        name="offramp",
        cls=CleanErrors,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
        help="Early exit for the models people already use.",
    )
    app.command("list")(list_names)
    app.command("calibrate")(calibrate)
    app.command("report")(report)
    for name in GROUPS:
        group(app, name)
    from offramp.commands_bench import bench_kernels, bench_overhead  # it imports this module

    group(app, "bench").command("kernels")(bench_kernels)
    group(app, "bench").command("overhead")(bench_overhead)
    found = plugins()
    for name in found.loaded:
        others = [p for n, p in found.manager.list_name_plugin() if n != name]
        try:
            found.manager.subset_hook_caller("offramp_commands", others)(app=app)
        except Exception as error:  # a plugin may fail in any way; it is named and the rest works
            console(stderr=True).print(f"[yellow]plugin {name}: its commands are missing: {escape(repr(error))}[/]")
    return app


def list_names(out: Json = None) -> None:
    """List policies, heads, calibrators and losses by name, and the plugins found."""
    import torch

    from offramp import kernels
    from offramp._plugins import plugins
    from offramp._registry import kinds, names

    found, device = plugins(), "cuda" if torch.cuda.is_available() else "cpu"
    body: dict[str, Any] = {
        "names": {kind.__name__: names(kind) for kind in kinds()},
        "kernels": {op: kernels.available(op, device) for op in kernels.ops()},
        "plugins": {name: str(getattr(module, "__name__", module)) for name, module in sorted(found.loaded.items())},
        "broken": {name: repr(error) for name, error in sorted(found.broken.items())},
    }
    table = Table("kind", "names")
    for kind, known in [*body["names"].items(), ("kernels", kernels.ops())]:
        table.add_row(kind, ", ".join(known))
    for name, why in list(body["kernels"]["head_stats"].items())[1:]:
        table.add_row(f"kernels ({name})", escape(why) if why else "available")
    plugin_table = Table("plugin", "state")
    for name, module in body["plugins"].items():
        plugin_table.add_row(name, f"loaded ({escape(module)})")
    for name, error in body["broken"].items():
        plugin_table.add_row(name, f"[red]did not load:[/] {escape(error)}")
    if not body["plugins"] and not body["broken"]:
        plugin_table.add_row("none", "install one, e.g. pip install offramp-hf")
    console().print(table, plugin_table)
    write_json(out, body)


def calibrate(
    trace: Annotated[Path, typer.Argument(help="A trace, as `offramp record` or trace.save() wrote it.")],
    policy: Annotated[str, typer.Option(help="Name of the policy whose threshold is looked for.")] = "confidence",
    method: Annotated[str, typer.Option(help="Name of the calibrator.")] = "fixed_sequence",
    risk: Annotated[
        str | None, typer.Option(help="disagreement, accuracy_drop or excess_loss; default: the method's own.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="The risk that is promised not to be exceeded.")] = 0.05,
    delta: Annotated[float, typer.Option(help="How often the promise may fail: 0.05 is 95 % confidence.")] = 0.05,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Option NAME=VALUE of policy or method.")] = None,
    save: Annotated[Path | None, typer.Option("--out", help="Write the calibration here (for offramp.enable).")] = None,
    out: Json = None,
) -> None:
    """Choose thresholds on a trace so that a risk is bounded, and print what is promised."""
    import offramp
    from offramp.report.words import explain, promise

    table = offramp.Trace.load(trace)
    found = offramp.calibrate(
        table, policy, method=method, risk=risk, alpha=alpha, delta=delta, **options_from(set_ or [])
    )
    outcome = offramp.simulate(table, found)
    certificate = as_dict(found)
    console().print(f"policy: {escape(str(found.policy))}", soft_wrap=True)
    console().print(f"on this trace: {escape(str(outcome))}", soft_wrap=True)
    console().print(f"[bold]{escape(promise(certificate['certificate'], found.note))}[/]", soft_wrap=True)
    for name, value, meaning in explain(certificate["certificate"]):
        console().print(f"  {name} = {escape(value)}: {escape(meaning)}", soft_wrap=True)
    if save is not None:
        found.save(save)
        console().print(f"wrote {escape(str(save))}", soft_wrap=True)
    values = {"depth_mean": outcome.depth_mean, "saved": outcome.saved, "agreement": outcome.agreement}
    write_json(out, {**certificate, "outcome": values})


def as_dict(calibration: Any) -> dict[str, Any]:
    """Return policy, certificate and note of a calibration as plain JSON values."""
    from dataclasses import asdict

    made = calibration.certificate
    return {
        "policy": calibration.policy.config(),
        "certificate": None if made is None else asdict(made),
        "note": calibration.note,
    }


def report(
    run: Annotated[Path, typer.Argument(help="The JSON of a run, e.g. demo/report.json.")],
    page: Annotated[Path | None, typer.Option("--out", help="The HTML file; default: beside the JSON.")] = None,
    out: Json = None,
) -> None:
    """Write one self-contained HTML file from the JSON of a run."""
    from offramp.report import read, sections, write

    body = read(run)
    page = run.with_suffix(".html") if page is None else page
    write(body, page)
    console().print(f"wrote {escape(str(page))}", soft_wrap=True)
    write_json(out, {"page": str(page), "sections": [name for name, _, _ in sections(body)]})


def main() -> None:
    """Run the command line."""
    build()()
