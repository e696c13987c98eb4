"""What can be asked on the command line: each command's signature and docstring are its options.

A parameter before the star is given by its place, one after it by `--name`; a docstring's text that
begins with capitals and a colon says what stands for the value. What a command needs is imported
when it is run, so that help and mistakes in the options wait for nothing.
"""

from __future__ import annotations

from typing import Literal

from lightning_fp.cli.parser import Commands

Hardware = Literal["h100", "h200", "b200", "l40s", "rtx4090", "a100", "mi300"]
"""As `lightning_fp.kernels.cost`, which imports more than a command's help may."""


def doctor(*, fp16: str | None = None, json: bool = False) -> int:
    """Show what this machine has, and which formats run on it: in hardware, emulated or not.

    Args:
        fp16: FACTORY: advise on a loss scale for the model of package.module:factory or
            path/to/file.py:factory, which returns (LightningModule, batch) or (module, loss)
        json: print everything as JSON
    """
    from lightning_fp.cli.commands.doctor import run

    return run(fp16=fp16, json=json)


def plan(
    factory: str,
    *,
    scaling: str = "fp8-dynamic",
    layers: tuple[str, ...] = (),
    backend: str = "auto",
    cuda_fp8: bool = False,
    hardware: Hardware | None = None,
    tokens: int | None = None,
    devices: int = 1,
    fp8_all_gather: bool = False,
    all: bool = False,
    json: bool = False,
) -> int:
    """Show what conversion would do to a model, layer by layer, without training it.

    Args:
        factory: package.module:factory or path/to/file.py:factory; returns a module, or a module
            and an example input with which FLOPs are counted
        scaling: format of layers that no rule names
        layers: PATTERN=FORMAT: a layer rule, may be repeated, the first match wins; or all of them
            as a JSON object
        backend: auto, native, torchao or transformer-engine
        cuda_fp8: plan for a GPU with FP8 tensor cores (sm89 or later), whatever is here
        hardware: plan for this card, and predict what it gains over bf16
        tokens: with --hardware: tokens of a micro-batch; by default those of the example input
        devices: with --hardware: devices that weights and optimizer are sharded over
        fp8_all_gather: with --hardware and --devices: predict for weights that are gathered in FP8,
            as under FSDP2 with one scale per tensor
        all: a row for every layer; else repeated blocks share rows
        json: print the report as JSON
    """
    from lightning_fp.cli.commands.plan import run

    return run(
        factory,
        scaling,
        layers,
        backend,
        cuda_fp8=cuda_fp8,
        hardware=hardware,
        tokens=tokens,
        devices=devices,
        fp8_all_gather=fp8_all_gather,
        all=all,
        json=json,
    )


def recipes_list(*, json: bool = False) -> int:
    """The built-in recipes, with their stages.

    Args:
        json: print JSON
    """
    from lightning_fp.cli.commands.recipes_list import run

    return run(json=json)


def recipes_show(name: str) -> int:
    """A built-in recipe as YAML, to copy and change.

    Args:
        name: one of those that `lightning-fp recipes list` names
    """
    from lightning_fp.cli.commands.recipes import show

    return show(name)


def recipes_check(
    file: str, *, model: str | None = None, scaling: str = "fp8-dynamic", json: bool = False
) -> int:
    """What a recipe does, and what is wrong with it.

    Args:
        file: a YAML file, or the name of a built-in recipe
        model: FACTORY: package.module:factory or path/to/file.py:factory: which of its layers each
            stage touches
        scaling: with --model: the scaling that the plugin will be configured with
        json: print JSON, with all layers
    """
    from lightning_fp.cli.commands.recipes import check

    return check(file, model, scaling, json=json)


def recipes_schema() -> int:
    """The JSON schema of recipes, for editors."""
    from lightning_fp.cli.commands.recipes import schema

    return schema()


def mismatch(
    factory: str,
    *,
    formats: str = "bf16,fp16,fp8-dynamic",
    rollout: str | None = None,
    layers: tuple[str, ...] = (),
    batch: int = 8,
    length: int = 32,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Compare formats by how far training and rollout are apart; or tell why they were in a run.

    Args:
        factory: package.module:factory or path/to/file.py:factory; returns a model,
            (model, tokens) or (model, tokens, decode): model(tokens) gives logits [batch, tokens,
            vocabulary], and decode(model, tokens) the same as the rollout engine computes them. Or
            the directory of a run, whose mismatch is printed with its causes; no option but
            --json has a meaning then
        formats: of training, the first one to compare with
        rollout: FORMAT: format of the engine; training's if it is not given
        layers: PATTERN=FORMAT: a layer rule for the formats below 16 bits, may be repeated, the
            first match wins
        batch: sequences to sample if the factory gives no tokens
        length: tokens of each of these
        device: cpu, cuda, or auto: cuda if there is one
        json: print everything as JSON
    """
    from lightning_fp.cli.commands import mismatch_run
    from lightning_fp.cli.commands.mismatch import run

    if mismatch_run.is_run(factory):
        return mismatch_run.run(factory, json=json)
    return run(factory, formats, rollout, layers, batch, length, device, json=json)


def export(
    checkpoint: str,
    *,
    format: Literal["hf-fp8-block", "compressed-tensors-fp8"] = "hf-fp8-block",
    output: str = "exported",
    config: str | None = None,
    prefix: str = "",
    requantise: bool = False,
    json: bool = False,
) -> int:
    """Write a checkpoint's weights as FP8 safetensors that inference engines load.

    Args:
        checkpoint: a Trainer's checkpoint, a sharded one too, or a run, of which the newest is
            taken
        format: hf-fp8-block for scales per tensor and per block of 128x128, as DeepSeek-V3 has
            them; compressed-tensors-fp8 for those and scales per row
        output: DIR: where to write; it must have no safetensors files and no config.json yet
        config: FILE: the model's config.json, which is completed
        prefix: what names begin with and is left out, e.g. `model.` of a LightningModule
        requantise: cast layers again if the format cannot hold their scales; else it is an error
        json: print JSON
    """
    from lightning_fp.cli.commands.export import run

    return run(checkpoint, format, output, config, prefix, requantise=requantise, json=json)


def demo(
    *,
    output: str = "runs/demo",
    steps: int = 96,
    scaling: str = "fp8-dynamic",
    batch_size: int = 8,
    context: int = 64,
    seed: int = 0,
    rollout: bool = True,
    json: bool = False,
) -> int:
    """Train a small GPT in BF16 and FP8; then roll FP8 out by a recipe, with faults on the way.

    Args:
        output: DIR: directory to write to
        steps: optimizer steps of each run
        scaling: format of the FP8 runs
        batch_size: sequences per step
        context: bytes per sequence
        seed: seed of weights and batches
        rollout: whether to run the second part, with the recipe
        json: print JSON; progress goes to stderr
    """
    from lightning_fp.cli.commands.demo import run

    return run(output, steps, scaling, batch_size, context, seed, rollout=rollout, json=json)


def baseline(
    factory: str,
    *,
    steps: int = 200,
    output: str = "runs/baseline",
    precision: Literal["bf16-mixed", "bf16-true", "32-true"] = "bf16-mixed",
    seed: int = 0,
    json: bool = False,
) -> int:
    """Record a short run in BF16: what rollout gates and reports compare an FP8 run with.

    Args:
        factory: package.module:factory or path/to/file.py:factory; returns a LightningModule that
            has a train_dataloader, or a LightningModule and its data (a dataloader or a
            LightningDataModule), or both and a mapping of Trainer options
        steps: optimizer steps
        output: DIR: where the records go; those of an earlier baseline are replaced
        precision: as the Trainer has it
        seed: of weights and data
        json: print JSON
    """
    from lightning_fp.cli.commands.baseline import run

    return run(factory, steps, output, precision, seed, json=json)


def stats(run: str, *, layer: str | None = None, top: int = 8, json: bool = False) -> int:
    """Show which layers a run's formats hurt most, and any layer's course over the steps.

    Args:
        run: directory that ClampMonitor wrote to
        layer: GLOB: show the course of the layers that match
        top: how many of the worst to show
        json: print JSON
    """
    from lightning_fp.cli.commands import stats

    return stats.run(run, layer, top, json=json)


def report(
    runs: tuple[str, ...],
    *,
    output: str | None = None,
    baseline: str | None = None,
    open: bool = False,
    json: bool = False,
) -> int:
    """Write a run's report as one HTML file, and print a summary of it; several runs are compared.

    Args:
        runs: directories that ClampMonitor and the others wrote to
        output: FILE: where to write; report.html in the first run if it is not given
        baseline: RUN: a run in high precision to compare times with, e.g. of
            `lightning-fp baseline`
        open: open the file in the browser
        json: print the summary as JSON
    """
    from lightning_fp.cli.commands.report import run

    return run(runs, output, baseline, open=open, json=json)


def study_clamp(
    run: str | None = None,
    *,
    loss: str | None = None,
    column: str = "train_loss",
    statistic: Literal["clamped_mass", "overflow_bits"] = "clamped_mass",
    window: int = 8,
    threshold: float = 6.0,
    refractory: int = 16,
    correction: Literal["max", "holm"] = "max",
    begin: int = 0,
    top: int = 10,
    ab: str | None = None,
    layers: tuple[str, ...] = (),
    rule: tuple[str, ...] = (),
    steps: int = 200,
    seed: int = 0,
    output: str = "runs/clamp_ab",
    json: bool = False,
) -> int:
    """Tell whether loss spikes come from clamping: from a run's records, or by an A/B (--ab).

    Args:
        run: directory that ClampMonitor wrote to
        loss: FILE: the run's loss: a CSVLogger's metrics.csv, or Parquet or CSV with two columns,
            step and loss; loss.csv (of ClampMonitor) or metrics.csv in the run's directory if it is
            not given
        column: name of the loss in metrics.csv
        statistic: clamped_mass, on sampled steps; or overflow_bits, exact at every step under
            delayed scaling
        window: steps before and after a spike to look at
        threshold: height of a spike above the running median, in robust standard deviations
        refractory: calm steps after which the next outlier is a new spike
        correction: of p-values for the number of operands
        begin: leave out the steps before, e.g. the warm-up
        top: how many operands to show
        ab: FACTORY: train twice instead: the factory takes no arguments and returns a
            LightningModule, a dataloader and, if wanted, a mapping of Trainer options
        layers: PATTERN: with --ab: the suspected layers, which clamp in run A and do not in B;
            repeatable
        rule: PATTERN=FORMAT: with --ab: a layer rule of both runs; all other layers are on
            fp8-delayed
        steps: with --ab: length of each run
        seed: with --ab: seed of both runs
        output: DIR: with --ab: where records go
        json: print JSON
    """
    from lightning_fp.cli.commands.study_clamp import run as look

    return look(
        run=run,
        loss=loss,
        column=column,
        statistic=statistic,
        window=window,
        threshold=threshold,
        refractory=refractory,
        correction=correction,
        begin=begin,
        top=top,
        ab=ab,
        layers=layers,
        rule=rule,
        steps=steps,
        seed=seed,
        output=output,
        json=json,
    )


def study_sweep(
    factory: str | None = None,
    *,
    preset: str | None = None,
    formats: str = "bf16,fp8-dynamic,fp8-delayed",
    lr: str = "1e-3,3e-3,1e-2",
    seeds: int = 3,
    steps: int = 200,
    axis: tuple[str, ...] = (),
    dir: str = "runs/sweep",
    storage: str | None = None,
    threads: int = 1,
    speedup: float | None = None,
    hardware: Hardware | None = None,
    emit: str | None = None,
    json: bool = False,
) -> int:
    """Measure how often formats fail at which learning rates: many short runs, compared with BF16.

    The same command continues where it was stopped or killed; started twice, it works twice as
    fast.

    Args:
        factory: package.module:factory or file.py:factory; it takes lr, and seed, steps and further
            axes if it wants them, and returns a LightningModule, or one and its data, or both and a
            mapping of Trainer options
        preset: tiny: a small byte-level GPT instead of a factory
        formats: their names, with commas between; bf16 among them, to compare with
        lr: learning rates, with commas between
        seeds: how many; of weights and batches
        steps: optimizer steps of each run
        axis: NAME=VALUE,VALUE: a further axis: clip, fallback=on,off, recipe, signals=on, base,
            layers=all, or a parameter of the factory, e.g. batch_size=8,16; repeatable
        dir: where all of it goes: cells.parquet, sweep.html, and a run's records for each cell
        storage: URL: keep the table of cells there, for workers on many machines: any database
            that SQLAlchemy knows; a SQLite file in DIR if it is not given
        threads: of this worker; more workers are faster than more threads
        speedup: FACTOR: of a step in low precision over one in bf16, measured or from
            elsewhere: say what a run then costs in the end, retries and all
        hardware: the same with the speed that `lightning-fp plan` predicts for this card
        emit: FILE: write a rollout recipe with the first format that passed, and what all did
        json: print the findings as JSON
    """
    from lightning_fp.cli.commands.study_sweep import run

    return run(
        factory,
        preset=preset,
        formats=formats,
        lr=lr,
        seeds=seeds,
        steps=steps,
        axis=axis,
        dir=dir,
        storage=storage,
        threads=threads,
        speedup=speedup,
        hardware=hardware,
        emit=emit,
        json=json,
    )


def study_predictors(
    directories: tuple[str, ...],
    *,
    ahead: tuple[int, ...] = (),
    seed: int = 0,
    json: bool = False,
) -> int:
    """Find out which signals announce a run's failure before the loss does.

    Args:
        directories: of a sweep whose runs had a StabilityMonitor, or of such runs
        ahead: STEPS: how many steps before the failure to predict it; repeatable, by default 5, 10
            and 20
        seed: of the draws behind the intervals
        json: print JSON
    """
    from lightning_fp.cli.commands.study_predictors import run

    return run(directories=directories, ahead=ahead or (5, 10, 20), seed=seed, json=json)


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> int:
    """Print the completion of this command line for a shell.

    Args:
        shell: e.g. `eval "$(lightning-fp completion bash)"` in ~/.bashrc
    """
    from lightning_fp.cli.completion import run

    return run(shell)


COMMANDS: Commands = {
    "doctor": doctor,
    "plan": plan,
    "recipes": (
        "Rollout recipes: list and show the built-in ones, check one's own, print the JSON schema.",
        {
            "list": recipes_list,
            "show": recipes_show,
            "check": recipes_check,
            "schema": recipes_schema,
        },
    ),
    "mismatch": mismatch,
    "export": export,
    "demo": demo,
    "baseline": baseline,
    "stats": stats,
    "report": report,
    "study": (
        "Answer questions with runs: `study sweep`: which formats fail, and where? `study clamp`:"
        " do loss spikes come from clamping? `study predictors`: what foretells a failure?",
        {"sweep": study_sweep, "clamp": study_clamp, "predictors": study_predictors},
    ),
    "completion": completion,
}
"""The command line, in the order of its help."""
