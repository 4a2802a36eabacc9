"""Runs that train an FPDM or a DiT, for a time, and judge the images of both samplers at several budgets."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.chains import DDIMChain, StochasticDDIMChain
from fixpoint_diffusion.denoisers import FPDMDenoiser, NetworkDenoiser, load_denoiser
from fixpoint_diffusion.experiments.experiment import Kind
from fixpoint_diffusion.experiments.papers.fpdm.drawing import pictures
from fixpoint_diffusion.experiments.plans import LATENTS, published_flops
from fixpoint_diffusion.experiments.records import Config, Measures
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.models import FPDMConfig
from fixpoint_diffusion.models.fpdm.training_rules import training_rule
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import sample_fpdm
from fixpoint_diffusion.training.checkpoints import CHECKPOINT
from fixpoint_diffusion.training.data.options import DataOptions
from fixpoint_diffusion.training.runs import TrainingRun

_BATCH = 128
# A step's time is found by so many trials of so many steps, in turn with DiT's: a machine that others use is as slow
# for both. Steps of S-JFB are of random depth, so that it takes many.
_TRIALS, _TRIAL = 8, 30
_BATCH_SIZE = 512  # of the paper


def _train(config: Config, resources: Resources) -> Measures:
    """``network``, ``settings``, ``data``, ``time`` or ``steps``, ``match``, ``budgets``, ``iterations``, ``images``,
    ``seed``; ``model``, at the paper's scale: a trained folder.

    ``time`` is that of so many ``steps`` of a DiT with these ``settings``. ``match`` says what a control has in common
    with the other network's run of the same ``time``: ``"flops"`` or ``"steps"`` of its training. None: the time.
    """
    if config.get("model"):
        denoiser, measures = resources.denoiser(config["model"]), Measures()
    else:
        folder = resources.scratch / _folder_name(config, resources.records.code)
        run = _resumed(folder, resources) or _started(folder, config, resources)
        log = run.run(progress=False)
        plan = run.plan()
        denoiser = load_denoiser(folder, device=resources.device)
        measures = {
            "steps": run.config.steps,
            "training_seconds": log.seconds,
            "training_flops": plan.flops,
            "parameters": plan.parameters,
            "loss": log.lines[-1][1] if log.lines else log.pending / run.config.steps,
        }
    found: dict[str, float] = {}
    for eta, sampler in ((1.0, "DDPM"), (0.0, "DDIM")):
        for budget in config["budgets"]:
            first: list[Tensor] = []
            batches = _batches(denoiser, config, resources, budget, eta, first)
            found[f"{sampler} {budget}"] = resources.distance(batches, config["data"])
            measures["images"] = pictures(first[0], f"{config['network']}, {budget} passes")
    return {**measures, "distances": found}


def _resumed(folder: Path, resources: Resources) -> TrainingRun | None:
    return TrainingRun.resume(folder, device=resources.device) if (folder / CHECKPOINT).exists() else None


def _started(folder: Path, config: Config, resources: Resources) -> TrainingRun:
    return TrainingRun.start(folder, **_options(config, resources, _steps(config, resources)))


def _options(config: Config, resources: Resources, steps: int) -> dict[str, Any]:
    return {
        "kind": config["network"],
        "data": DataOptions(source=resources.training_data(config["data"])),
        "settings": config["settings"],
        "training": {"steps": steps, "seed": config["seed"], "checkpoint_every": 500},
        "device": resources.device,
    }


def _steps(config: Config, resources: Resources) -> int:
    """As given; or those that take as long as DiT's; or those of the run that this one is a control of."""
    if config.get("steps"):
        return config["steps"]
    if config["match"]:
        network = {"fpdm": "dit", "dit": "fpdm"}[config["network"]]
        reference = {**config, "network": network, "settings": config["settings_of_other"], "match": None}
        reference.pop("settings_of_other")
        other = resources.records.compute(TRAININGS.name, reference, TRAININGS.with_resources(resources)).measures
        if config["match"] == "steps":
            return other["steps"]
        with tempfile.TemporaryDirectory() as trial:
            one = TrainingRun.start(trial, **_options(config, resources, 1), dry=True).plan().flops
        return max(1, round(other["training_flops"] / one))
    return steps_in_time(config, resources)


def steps_in_time(config: Config, resources: Resources) -> int:
    """How many steps take ``config["time"]``. It is measured once, and so the same for all seeds."""
    dit, steps = config["time"]["settings"], config["time"]["steps"]
    if config["network"] == "dit" and config["settings"] == dit:
        return steps
    pair = {"network": config["network"], "settings": config["settings"], "dit": dit, "data": config["data"]}
    found = resources.records.compute(STEP_TIMES.name, pair, STEP_TIMES.with_resources(resources)).measures
    return max(1, round(steps / found["dit_steps"]))


def _time_step(config: Config, resources: Resources) -> Measures:
    """How many steps of DiT take as long as one of the network, and the seconds of both."""
    dit = {**config, "network": "dit", "settings": config["dit"]}
    trials = [[_trial_seconds({**each, "seed": n}, resources) for each in (config, dit)] for n in range(_TRIALS)]
    one, other = (sum(each) / (_TRIALS * _TRIAL) for each in zip(*trials, strict=True))
    return {"dit_steps": one / other, "step_seconds": one, "dit_step_seconds": other}


def _trial_seconds(config: Config, resources: Resources) -> float:
    with tempfile.TemporaryDirectory() as trial:
        return TrainingRun.start(trial, **_options(config, resources, _TRIAL)).run(progress=False).seconds


def _folder_name(config: Config, code: str) -> str:
    """The same for whatever is only judged otherwise; another for other code, whose records are others too."""
    trained = {k: v for k, v in config.items() if k not in ("budgets", "iterations", "images")} | {"code": code}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config['network']}-{config['data']}-seed{config['seed']}-{digest}"


def _batches(
    denoiser: NetworkDenoiser, config: Config, resources: Resources, budget: int, eta: float, first: list[Tensor]
) -> Iterator[Tensor]:
    """Images at a budget of block passes; of an FPDM with ``config["iterations"]`` a step."""
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config or {})
    seed, shape = config["seed"], tuple(denoiser.sample_shape or ())
    for number in range(0, config["images"], _BATCH):
        samples = range(number, min(number + _BATCH, config["images"]))
        x_T = initial_noise(seed, samples, shape).to(resources.device)
        labels = {}
        if (classes := getattr(denoiser.model.config, "num_classes", None)) is not None:
            labels["class_labels"] = torch.arange(samples.start, samples.stop, device=resources.device) % classes
        if isinstance(denoiser, FPDMDenoiser):
            model = denoiser.model.eval()
            steps = budget // model.config.block_passes(config["iterations"])
            images = sample_fpdm(
                model,
                x_T,
                schedule,
                steps=steps,
                iterations=config["iterations"],
                eta=eta,
                seed=seed,
                first_sample=number,
                y=labels.get("class_labels"),
            ).images
        else:
            options = {"steps": budget // denoiser.model.config.depth, "spacing": "trailing", "conditioning": labels}
            chain: DDIMChain
            if eta:
                chain = StochasticDDIMChain(denoiser, x_T, schedule, eta=eta, seed=seed, first_sample=number, **options)
            else:
                chain = DDIMChain(denoiser, x_T, schedule, **options)
            with torch.no_grad():
                images = chain.sequential(trajectory=False)
        first.append(resources.pictures(images, config["data"]))
        yield first[-1]


def _step_flops(network: str, settings: Mapping[str, Any]) -> float:
    """Operations of a published network's training step for one image, on average."""
    if network == "dit":
        return 3 * published_flops("dit", {})
    rule = training_rule(FPDMConfig(**{**vars(FPDMConfig.preset("XL/2")), **settings}))
    outside, one = (published_flops("fpdm", settings, k) for k in (0, 1))
    return 3 * outside + (rule.no_grad + 3 * rule.grad) * (one - outside)


def _published_steps(config: Config) -> int:
    """``config["steps"]`` are DiT's; an FPDM gets as many as take the same operations, for equal time."""
    return round(config["steps"] * _step_flops("dit", {}) / _step_flops(config["network"], config["settings"]))


def _flops(config: Config) -> float:
    """Of the published training and of sampling."""
    network, settings, iterations = config["network"], config["settings"], config["iterations"]
    explicit = 28 if network == "dit" else settings.get("n_pre", 1) + settings.get("n_post", 1) + iterations
    call = published_flops(network, settings, 0 if network == "dit" else iterations)
    sampling = sum(2 * config["images"] * call * (budget // explicit) for budget in config["budgets"])
    return sampling + _step_flops(network, settings) * _BATCH_SIZE * _published_steps(config)


def _before(config: Config) -> str:
    """The training of the model that the configuration names."""
    name, network = config["model"], config["network"]
    settings = {"width": 1152, "heads": 16, "patch_size": 2, "learn_sigma": True}
    settings |= {"depth": 28} if network == "dit" else config["settings"]
    classes = " --classes" if config["data"] == "imagenet" else ""
    where = f"--data DATA/{config['data']}" + (" --latents" if config["data"] in LATENTS else "")
    return (
        f"echo '{json.dumps(settings)}' > {name}.json && accelerate launch -m fixpoint_diffusion.cli train {network} "
        f"--settings {name}.json {where}{classes} --batch-size {_BATCH_SIZE} --learning-rate 1e-4 --weight-decay 0 "
        f"--ema-decay 0.9999 --precision bf16 --device cuda --steps {_published_steps(config)} --out MODELS/{name}"
    )


TRAININGS = Kind(name="fpdm-training", run=_train, flops=_flops, before=_before)
STEP_TIMES = Kind(name="fpdm-step-time", run=_time_step, flops=lambda config: 0.0)
