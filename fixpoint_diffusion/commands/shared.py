"""What commands share: opening a model or a device by its name, and options that several take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from fixpoint_cli.names import near_miss
from fixpoint_diffusion.options.models import EMBEDDED_MODELS

if TYPE_CHECKING:
    from fixpoint_diffusion.denoisers import NetworkDenoiser

F = TypeVar("F", bound=Callable[..., Any])


class ChannelsName(StrEnum):
    L = "L"
    LA = "LA"
    RGB = "RGB"
    RGBA = "RGBA"


class CropName(StrEnum):
    CENTER = "center"
    RANDOM = "random"
    PATCH = "patch"


def open_model(model: str, *, device: str = "cpu") -> tuple[NetworkDenoiser, Path]:
    """Load an embedded model by its name, or a model folder; returns the denoiser and the folder.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the model does not load, or there is no such device.
    """
    folder = model_folder(model)
    check_device(device)
    from fixpoint_diffusion.denoisers import load_denoiser

    return load_denoiser(folder, device=device), folder


def model_folder(model: str) -> Path:
    """The folder of an embedded model by its name, or the model folder of that name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if model in EMBEDDED_MODELS:
        from fixpoint_diffusion.denoisers import embedded_folder

        return embedded_folder(model)
    if not model or not Path(model).is_dir():
        near, known = near_miss(model, EMBEDDED_MODELS), ", ".join(EMBEDDED_MODELS)
        raise FileNotFoundError(f"no model folder {model!r}.{near} The embedded models are {known}")
    return Path(model)


def check_device(name: str) -> None:
    """Refuse a device that this machine or this build of PyTorch does not have.

    >>> check_device("cpu")
    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: no device 'gpu'; here there are cpu
    """
    import torch

    try:
        # A value that is read back: the device "meta" makes tensors and holds none.
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError) as error:
        available = [kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available()]
        raise ValueError(f"no device {name!r}; here there are {', '.join(['cpu', *available])}") from error


def path_option(text: str | Path) -> Path:
    """A file or folder from the command line, or the option's default; an empty name is not the current folder."""
    if not str(text).strip() or "\0" in str(text):
        raise typer.BadParameter(f"no file or folder can have the name {str(text)!r}")
    return Path(text)


def with_options(options: type[Any], *, default: str = "{}") -> Callable[[F], F]:
    """Let a command take the fields of a dataclass that are made by ``option``: those its signature does not name.

    The command gets their values by keyword, in ``**given``.

    Args:
        options: the dataclass.
        default: how help texts tell a field's default. ``"{}"``: it is the option's default too. Otherwise the
            option's default is None, and whoever gets it knows better.
    """
    hints = get_type_hints(options)

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        shared = []
        for field in fields(options):
            if "help" not in field.metadata:
                continue
            data, hint = field.metadata, _without_none(hints[field.name])  # the type, as typer is to see it
            names = [data["flag"]] if data["flag"] else []
            about: dict[str, Any] = {"help": data["help"]}
            if default != "{}":
                about["show_default"] = default.format(field.default)
            if data["parser"]:
                about["parser"] = data["parser"]
                hint = str  # typer takes no union, and leaves the type to the parser
            else:
                about |= {"min": data["low"], "max": data["high"]}
            if get_origin(hint) is Literal:  # which older versions of typer do not know
                hint = _choices(field.name, get_args(hint))
            value = field.default if default == "{}" else None
            annotation: Any = Annotated[hint | None if value is None else hint, typer.Option(*names, **about)]
            shared.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
            )
        parameters = [*own, *shared]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
        return command

    return decorate


def _without_none(hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and get_origin(hint) in (Union, UnionType) else hint


def _choices(name: str, values: tuple[str, ...]) -> Any:
    return StrEnum(name, {value: value for value in values})
