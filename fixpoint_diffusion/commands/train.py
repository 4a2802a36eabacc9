"""``fixpoint-diffusion train``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from fixpoint_cli.names import hint
from fixpoint_diffusion.commands.shared import ChannelsName, CropName, check_device, path_option, with_options
from fixpoint_diffusion.files import check_source
from fixpoint_diffusion.options.models import OWN_FAMILIES
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.ranks import ending_group, is_first

_OBJECTIVES = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample", "flow": "flow_prediction"}


class BackwardName(StrEnum):
    SJFB = "sjfb"
    MULTI_JFB = "multi-jfb"
    JFB = "jfb"
    PHANTOM = "phantom"
    IFT = "ift"
    SHINE = "shine"


class PresetName(StrEnum):
    PAPER = "paper"
    RELEASED = "released"
    OURS = "ours"


@with_options(TrainingConfig, default="the model family's, or {}")
def train(
    context: typer.Context,
    kind: Annotated[
        str | None, typer.Argument(help="Model family: unet (default), dit, fpdm, ...; the docs list all.")
    ] = None,
    kind_option: Annotated[str | None, typer.Option("--kind", help="The same, as an option.")] = None,
    out: Annotated[
        Path, typer.Option(parser=path_option, help="Folder for the model and its checkpoint.", metavar="FOLDER")
    ] = Path("runs/train"),
    data: Annotated[
        str, typer.Option(help="'digits', a folder of images (with class subfolders or without), a .npy file, latents.")
    ] = "digits",
    channels: Annotated[ChannelsName | None, typer.Option(help="Channels (default: as all files have them).")] = None,
    size: Annotated[str | None, typer.Option(help="Side of the images, or HEIGHTxWIDTH, to which all are cut.")] = None,
    crop: Annotated[CropName, typer.Option(help="How that size is reached; patch does not scale.")] = CropName.CENTER,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images left and right at random.")] = False,
    latents: Annotated[bool, typer.Option("--latents", help="The .npy file holds latents, of any range.")] = False,
    classes: Annotated[bool, typer.Option("--classes", help="Train a model that is told the data's classes.")] = False,
    init: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Model folder to start from, not random weights.", metavar="FOLDER"),
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="JSON file with settings of the model's architecture.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What the model predicts: epsilon, v_prediction, sample, or flow, along straight paths."),
    ] = None,
    backward: Annotated[
        BackwardName | None,
        typer.Option(help="Gradient of an FPDM's layer: sjfb (default), multi-jfb, jfb, phantom, ift or shine."),
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="fpdm, dit: as in FPDM's paper (paper); fpdm: as its code has it (released), as here (ours)."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the training would cost, and do nothing.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, max=256, help="Processes that read images; 0: the training's own.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, with its own settings; --steps may be more.")
    ] = False,
    **options: Any,
) -> None:
    """Train a denoiser and write it as a model folder.

    Example: fixpoint-diffusion train unet --data digits --steps 9000 --out runs/my-unet

    Digits are trained on four fifths of scikit-learn's set; the rest is held out for judging. Ctrl-C finishes the step
    at hand and writes a checkpoint, from which --resume continues to the same result as an uninterrupted run. An option
    that is not given takes the value of the model family. On several devices: torchrun
    --nproc-per-node N -m fixpoint_diffusion train ...
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By name, because newer versions of typer bring their own copy of click.
    given = {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    if kind is not None and kind_option is not None:
        raise typer.BadParameter(f"the model family is named twice, {kind} and {kind_option}", param_hint="--kind")
    kind = kind or kind_option
    if resume:
        clashing = sorted(given.keys() - {"resume", "out", "steps", "device", "workers", "dry_run"})
        if clashing:
            names = ", ".join("kind" if name.startswith("kind") else "--" + name.replace("_", "-") for name in clashing)
            raise typer.BadParameter(f"a resumed run keeps its own settings; drop {names}", param_hint="--resume")
    if init is not None and kind is not None:
        raise typer.BadParameter(f"the model in {init} says of what kind it is; drop {kind}", param_hint="--init")
    _check_kind(kind)
    if backward is not None and init is None and kind != "fpdm":
        raise typer.BadParameter(f"only an fpdm has an implicit layer, got {kind or 'unet'}", param_hint="--backward")
    if objective not in (None, *_OBJECTIVES):
        raise typer.BadParameter(f"no objective {objective!r}; there are {', '.join(_OBJECTIVES)}")
    if objective is not None and init is not None:
        raise typer.BadParameter(f"the model in {init} says what it predicts; drop it", param_hint="--objective")
    check_source(data)
    if not dry_run:
        check_device(device)

    from fixpoint_diffusion.files import read_json
    from fixpoint_diffusion.training.data.options import DataOptions
    from fixpoint_diffusion.training.presets import preset_named
    from fixpoint_diffusion.training.runs import TrainingRun
    from fixpoint_diffusion.training.trainer import KEPT

    if resume:
        run = TrainingRun.resume(out, steps=options["steps"], device=device, workers=workers)
    else:
        changed = {} if settings is None else read_json(settings)
        if backward is not None:
            changed["backward"] = backward.value
        training = {name: _plain(given[name]) for name in options.keys() & given.keys()}
        if objective is not None:
            training["prediction_type"] = _OBJECTIVES[objective]
        chosen = DataOptions(
            source=data, channels=_plain(channels), size=_size(size), crop=crop.value, flip=flip, latents=latents
        )
        run = TrainingRun.start(
            out,
            kind=kind or "unet",
            data=None if preset is not None and "data" not in given else chosen,
            classes=classes,
            init=init,
            settings=changed,
            training=training,
            preset=_plain(preset),
            dry=dry_run,
            device=device,
            workers=workers,
        )
    say = typer.echo if is_first() else _nothing
    say(run.describe())
    if dry_run:
        say(run.plan().describe())
        unknown = "" if preset is None else preset_named(preset, kind or "unet").unknown
        if unknown:
            say(f"  not known    {unknown}")
        return
    try:
        with ending_group():
            log = run.run()
    except KeyboardInterrupt:
        say(
            "\nInterrupted; checkpoint written. Continue with:\n"
            f"  fixpoint-diffusion train --resume --out {quote(str(out))}"
        )
        raise typer.Exit(130) from None
    except Exception as error:
        if KEPT in getattr(error, "__notes__", ()):
            say(
                "\nStopped; checkpoint written. Continue with the same files, or start from its model with others:\n"
                f"  fixpoint-diffusion train --resume --out {quote(str(out))}\n"
                f"  fixpoint-diffusion train --init {quote(str(out))} --data DATA --out FOLDER"
            )
        raise
    told = " --class all" if run.labels is not None else ""
    decoded = " --vae FOLDER" if run.data.is_latent else ""
    say(
        f"Trained in {log.seconds:.0f} s, written to {out}. Try:\n"
        f"  fixpoint-diffusion sample --model {quote(str(out))}{told}{decoded}"
    )


def _nothing(message: str) -> None:
    """Say nothing: another process says it."""


def _check_kind(kind: str | None) -> None:
    # Others are known where a program has registered them, and so has imported PyTorch already.
    registry = sys.modules.get("fixpoint_diffusion.denoisers.registry")
    known = sorted(registry.families()) if registry else OWN_FAMILIES
    if kind is not None and kind not in known:
        raise typer.BadParameter(f"no model family {kind!r}.{hint(kind, known)}", param_hint="KIND")


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise typer.BadParameter(f"expected a number such as 64, or HEIGHTxWIDTH, got {text!r}", param_hint="--size")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value
