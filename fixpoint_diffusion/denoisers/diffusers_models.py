"""Networks of the diffusers library: built from settings, read from a folder, written to one."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.diffusers import DiffusersDenoiser
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.registry import Family, LoadOptions, family_of
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.files import read_json
from fixpoint_diffusion.models.weights import (
    StoredTensor,
    build_on_meta,
    check_fit,
    check_values,
    describe_error,
    read_headers,
)

WEIGHTS = "diffusion_pytorch_model"


def diffusers_family(
    *,
    name: str,
    class_name: str,
    build: Callable[[tuple[int, ...], int | None, Mapping[str, Any]], nn.Module],
    sample_shape: Callable[[Mapping[str, Any]], tuple[int, ...] | None],
    conditioning: Callable[[Mapping[str, Any]], Mapping[str, ConditioningInput]],
    schedule_config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> Family:
    """A :class:`Family` of diffusers' models: what all of these share is filled in."""
    return Family(
        name=name,
        class_name=class_name,
        build=build,
        denoiser=DiffusersDenoiser,
        load=load_module,
        save=save_module,
        sample_shape=sample_shape,
        conditioning=conditioning,
        schedule_config=schedule_config,
        training=training or {},
    )


def model_class(name: object, source: Path | str) -> Any:
    """The class of diffusers with that name.

    Raises:
        ImportError: if diffusers is not installed.
        ValueError: if it has no model class of that name.
    """
    with needed_for("loading this model"):
        import diffusers

    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{source}: _class_name is {name!r}; expected 'FPDM' or a model class of "
            f"diffusers {diffusers.__version__}, such as 'UNet2DModel'"
        )
    return cls


def build_module(class_name: str, settings: Mapping[str, Any], *, num_classes: int | None = None) -> nn.Module:
    """A new network with random weights.

    Args:
        class_name: its class in diffusers.
        settings: of its constructor.
        num_classes: for a network whose constructor takes ``num_class_embeds``: that many classes, and one label more
            that stands for "no class". Its config says so under ``_null_label``, a key that diffusers leaves alone.

    Raises:
        ValueError: if the class does not take these settings.
    """
    cls = model_class(class_name, "settings")
    if num_classes is not None:
        settings = {**settings, "num_class_embeds": num_classes + 1}
    try:
        model: Any = cls(**settings)
    except Exception as error:  # a constructor that is given arbitrary values raises whatever it likes
        raise ValueError(f"{class_name} does not take these settings: {describe_error(error)}") from error
    if num_classes is not None:
        model.register_to_config(_null_label=num_classes)
    network: nn.Module = model
    return network


def spatial_sizes(class_name: str, sample_shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """``sample_shape`` as it is, if it is ``(C, *spatial)`` with so many spatial dimensions.

    Raises:
        ValueError: if it is not.
    """
    if len(sample_shape) != dims + 1:
        raise ValueError(f"{class_name} takes samples with channels and {dims} more dimensions, got {sample_shape}")
    return sample_shape


def refuse_classes(family: str, num_classes: int | None) -> None:
    """Raise ValueError if a family that takes no class labels is asked for some."""
    if num_classes is not None:
        raise ValueError(f"the family {family!r} takes no class labels, but the data has {num_classes} classes")


def save_module(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``config.json`` and the weights as diffusers does; the model itself keeps its dtype."""
    # By torch's method: that of diffusers warns of modules to be kept in float32, even where there are none.
    stored: Any = model if dtype is None else nn.Module.to(copy.deepcopy(model), dtype)
    stored.save_pretrained(folder, safe_serialization=True)


def load_module(folder: Path, config: Mapping[str, Any], options: LoadOptions) -> nn.Module:
    """Read a network from a folder in diffusers' layout.

    Names and shapes of what is stored are compared with what the config describes before memory is asked for.

    Raises:
        FileNotFoundError: if weights are missing.
        ValueError: if config or weights are damaged or do not fit each other, or only a pickle is there.
        ImportError: if diffusers is not installed.
    """
    source = folder / "config.json"
    cls = model_class(config.get("_class_name"), source)
    variant, use_safetensors = _choose_weights(folder, options.allow_pickle)
    if "quantization_config" not in config:  # packed weights have shapes of their own
        stored = _stored(folder, variant, use_safetensors)
        expected: Any = build_on_meta(lambda: cls.from_config(dict(config)), len(stored), source)
        if hasattr(expected, "_fix_state_dict_keys_on_load"):
            expected._fix_state_dict_keys_on_load(stored)  # names that old versions of diffusers wrote
        check_fit(expected, stored, folder, dtype=options.dtype)
        try_out(expected, source)
    # Building the model draws initial weights that the stored ones replace: keep that out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        try:
            model = cls.from_pretrained(
                str(folder),
                torch_dtype=options.dtype,
                variant=variant,
                use_safetensors=use_safetensors,
                local_files_only=True,
                low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
                device_map=options.device_map,
            )
        except ImportError:
            raise
        except Exception as error:  # what damaged files do to diffusers' own reader cannot be foreseen
            name = config["_class_name"]
            raise ValueError(
                f"{folder} does not load as the {name} in its config.json: {describe_error(error)}"
            ) from error
    check_values(model.named_parameters(), folder)
    network: nn.Module = model if options.device_map is not None else model.to(options.device)
    return network


def try_out(network: nn.Module, source: Path | str) -> None:
    """Call a network of a known family on ``meta``, where that costs nothing: settings may fail only there."""
    family = family_of(network)
    config: Any = getattr(network, "config", None)
    if family is None or config is None:
        return
    config = config if isinstance(config, Mapping) else vars(config)
    shape = family.sample_shape(config)
    if shape is None:
        return
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
        raise ValueError(f"{source} describes samples of shape {shape}; expected positive whole numbers")
    denoiser, rows = family.denoiser(network.eval()), {}
    for name, wanted in denoiser.conditioning.items():
        row = [1 if size == -1 else size for size in wanted.shape]
        rows[name] = torch.zeros(1, *row, dtype=wanted.dtype, device="meta")
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, *shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"), **rows)
    except NotImplementedError:
        return
    except Exception as error:  # as when it was built
        if "meta" not in str(error):
            raise ValueError(f"{source} does not describe a usable network: {describe_error(error)}") from error


def _stored(folder: Path, variant: str | None, use_safetensors: bool) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of the weights in a folder, in one file or several."""
    end = ".safetensors" if use_safetensors else ".bin"
    single = folder / (f"{WEIGHTS}{end}" if variant is None else f"{WEIGHTS}.{variant}{end}")
    paths = [single] if single.is_file() else _shards(folder / _index_name(variant, end))
    if use_safetensors:
        return read_headers(paths)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
            found |= {name: _described(tensor) for name, tensor in tensors.items()}
        except Exception as error:  # as above
            raise ValueError(f"{path} does not load as weights: {describe_error(error)}") from error
    return found


def _described(tensor: torch.Tensor) -> StoredTensor:
    kind = tensor.dtype if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else None
    return StoredTensor(tuple(tensor.shape), kind, str(tensor.dtype).removeprefix("torch."))


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} must hold a weight_map from names of tensors to names of files")
    files = sorted(set(names.values()))
    if any(Path(name).name != name for name in files):
        raise ValueError(f"{index} names files outside its own folder: {', '.join(files)[:200]}")
    return [index.parent / name for name in files]


def _index_name(variant: str | None, end: str) -> str:
    return f"{WEIGHTS}{end}.index{'' if variant is None else '.' + variant}.json"


def _choose_weights(folder: Path, allow_pickle: bool) -> tuple[str | None, bool]:
    """``(variant, use_safetensors)`` for diffusers: full precision before half, safetensors before pickles."""
    for end, use_safetensors in ((".safetensors", True), (".bin", False)):
        for variant in (None, "fp16"):
            stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
            if not ((folder / f"{stem}{end}").is_file() or (folder / _index_name(variant, end)).is_file()):
                continue
            if not use_safetensors and not allow_pickle:
                raise ValueError(
                    f"{folder} holds its weights as a pickle ({stem}{end}), which may run code when opened: convert "
                    f"it to {WEIGHTS}.safetensors, or pass allow_pickle=True if you trust where it comes from"
                )
            return variant, use_safetensors
    raise FileNotFoundError(f"no weights in {folder}: expected {WEIGHTS}.safetensors, found {listing(folder)}")


def listing(folder: Path) -> str:
    """The names in a folder, for messages."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"
