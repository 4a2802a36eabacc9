"""The model families: how a kind of network is built, loaded, saved and used as a denoiser."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.modules import uncompiled
from fixpoint_diffusion.denoisers.protocol import ConditioningInput, NetworkDenoiser


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the weights of a model are read: the options of :func:`fixpoint_diffusion.load_denoiser`."""

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    device_map: str | Mapping[str, Any] | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of network, as loader, trainer, sampler and command line know it.

    A family is one file in ``fixpoint_diffusion/denoisers/families`` with a variable ``FAMILY``, or an object passed to
    :func:`register_family`.

    Attributes:
        name: by which the command line calls it, such as ``"unet"``.
        class_name: ``_class_name`` in its models' ``config.json``.
        build: ``build(sample_shape, num_classes, settings)`` makes a new network for samples ``(C, *spatial)``;
            ``num_classes`` is None for a network without class labels. ``settings`` are those of the architecture by
            name, as its config spells them. A network that can be told classes can also be told "no class".
        denoiser: ``denoiser(model, *, prediction_type=, schedule_config=, prior=, learned_variance=)`` wraps a network;
            gradients reach its parameters, so that a trainer may call the result.
        load: ``load(folder, config, options)`` reads the network from a model folder.
        save: ``save(model, folder, dtype)`` writes ``config.json`` and the weights, in that precision.
        sample_shape: shape of one sample, from the network's config (a mapping); None where that does not say.
        conditioning: the inputs beside x and t, from the network's config.
        schedule_config: the schedule that it is trained on unless told otherwise, as a diffusers scheduler's config.
        training: settings of training that differ from the trainer's defaults, by name.

    Example:
        See :func:`fixpoint_diffusion.denoisers.families`, which lists them.
    """

    name: str
    class_name: str
    build: Callable[[tuple[int, ...], int | None, Mapping[str, Any]], nn.Module]
    denoiser: Callable[..., NetworkDenoiser]
    load: Callable[[Path, Mapping[str, Any], LoadOptions], nn.Module]
    save: Callable[[nn.Module, Path, torch.dtype | None], None]
    sample_shape: Callable[[Mapping[str, Any]], tuple[int, ...] | None]
    conditioning: Callable[[Mapping[str, Any]], Mapping[str, ConditioningInput]]
    schedule_config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


_registered: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to the loader, the trainer and the command line.

    Raises:
        ValueError: if its name or its class belongs to another family.

    Example:
        >>> from fixpoint_diffusion.denoisers import family, register_family
        >>> register_family(family("unet"))
        Traceback (most recent call last):
        ...
        ValueError: ...
    """
    _check_new(family, {**_own_families(), **_registered})
    _registered[family.name] = family


def families() -> dict[str, Family]:
    """All known families by name.

    Example:
        >>> sorted(families())
        ['conditional-unet', 'diffusers-dit', 'dit', 'fpdm', 'unet', 'unet-1d', 'unet-3d']
    """
    return {**_own_families(), **_registered}


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: if there is none; the message names those that there are.

    Example:
        >>> from fixpoint_diffusion.denoisers import family
        >>> network = family("unet").build((1, 8, 8), None, {})
        >>> type(network).__name__
        'UNet2DModel'
    """
    known = families()
    if name not in known:
        raise ValueError(f"no model family {name!r}; there are {', '.join(sorted(known))}")
    return known[name]


def family_of(model: nn.Module) -> Family | None:
    """The family that a network belongs to, by the name of its class; None for a class that no family claims.

    Example:
        >>> from fixpoint_diffusion import embedded
        >>> from fixpoint_diffusion.denoisers import family_of
        >>> family_of(embedded("fpdm-digits").model).name
        'fpdm'
    """
    return family_of_class(type(uncompiled(model)).__name__)


def family_of_class(class_name: object) -> Family | None:
    """The family whose ``config.json`` has this ``_class_name``; None if there is none.

    Example:
        >>> from fixpoint_diffusion.denoisers import family_of_class
        >>> family_of_class("UNet2DModel").name, family_of_class("Unknown")
        ('unet', None)
    """
    return next((known for known in families().values() if known.class_name == class_name), None)


@cache
def _own_families() -> dict[str, Family]:
    # Here, not above: the families' files import this one.
    package = importlib.import_module("fixpoint_diffusion.denoisers.families")
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        family: Family = importlib.import_module(module.name).FAMILY
        _check_new(family, found)
        found[family.name] = family
    return found


def _check_new(family: Family, known: Mapping[str, Family]) -> None:
    for other in known.values():
        if family.name == other.name or family.class_name == other.class_name:
            raise ValueError(
                f"a model family {other.name!r} for class {other.class_name} exists: choose another name and class "
                f"than {family.name!r} and {family.class_name}"
            )
