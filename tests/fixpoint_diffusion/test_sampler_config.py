"""What is read of diffusers' schedulers, against their own signatures, tables and loops; and what is refused."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_ddpm_parallel
from torch import Tensor

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, SamplingChain, StochasticDDIMChain, Transitions, sample
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.processes import Clip, DynamicThreshold, SamplerConfig
from fixpoint_diffusion.processes.scheduler_tables import CLASSES, DDIM_CLASSES, DDPM_CLASSES, SOLVER_CLASSES

# Schedulers of diffusers use what newer versions of NumPy deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

X_T = 1.5 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LARGE_STEPS = 7  # does not divide 1000


def class_of(name: str) -> Any:
    if name == "DPMSolverSDEScheduler":  # it imports torchsde, which only its steps need
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
            module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        return module.DPMSolverSDEScheduler
    return getattr(diffusers.schedulers, name)


def other_classes() -> list[str]:
    found = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and name != "Scheduler"}
    return sorted(found - CLASSES.keys())


# The tables


@pytest.mark.parametrize("name", CLASSES)
def test_keys_and_defaults_are_those_of_the_installed_class(name: str) -> None:
    parameters = inspect.signature(class_of(name).__init__).parameters
    assert CLASSES[name] == {key: value.default for key, value in parameters.items() if key != "self"}


def test_every_other_class_of_diffusers_is_refused_by_name() -> None:
    others = other_classes()
    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler", "LCMScheduler"} <= set(others)
    for name in others:
        with pytest.raises(ValueError, match=f"the scheduler {name} (describes|is not known)") as caught:
            SamplerConfig.from_diffusers({"_class_name": name})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 240


def test_a_misspelled_class_is_answered_with_the_nearest_and_any_with_the_list_in_the_docs() -> None:
    with pytest.raises(ValueError, match=r"DDIMSheduler is not known. Did you mean 'DDIMScheduler'\?"):
        SamplerConfig.from_diffusers({"_class_name": "DDIMSheduler"})
    with pytest.raises(ValueError, match=r"MyOwnScheduler is not known. The docs"):
        SamplerConfig.from_diffusers({"_class_name": "MyOwnScheduler"})
    with pytest.raises(ValueError, match="docs list those that are read: Schedulers of diffusers") as caught:
        SamplerConfig.from_diffusers({"_class_name": "x" * 10_000})
    assert len(str(caught.value)) <= 240
    page = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    _, _, section = page.partition("## Schedulers of diffusers")
    assert [name for name in CLASSES if f"`{name}`" not in section] == []


class OtherSteps(diffusers.DDIMScheduler):
    """A subclass may step in any way."""


def test_subclasses_are_not_taken_for_their_bases() -> None:
    with pytest.raises(ValueError, match="OtherSteps is not known"):
        SamplerConfig.from_diffusers(OtherSteps())


# Steps


def network(prediction_type: str, channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Anything smooth that leaves the range of the images; with twice the channels, variances within [0.1, 0.9]."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        out = 1.5 * torch.tanh(x.roll(1, dims=1)) + (t / 2000).reshape(-1, 1, 1)
        return out if channels == 3 else torch.cat([out, 0.5 + 0.4 * torch.sin(3 * x)], dim=1)

    denoiser.learned_variance = channels == 6  # type: ignore[attr-defined]
    return denoiser


def exact(scheduler: Any, config: SamplerConfig) -> Any:
    """The scheduler with the levels in float64 that are compared with its own elsewhere."""
    scheduler.alphas_cumprod = config.schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(config.schedule.final_alpha, dtype=torch.float64)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def assert_steps_are_those_of(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch, steps: int = LARGE_STEPS, eta: float | None = None
) -> SamplingChain:
    """The sequential run and the cumulative and the one-step form, against diffusers' loop with the same noise."""
    config = SamplerConfig.from_diffusers(scheduler)
    learned = config.variance_type in ("learned", "learned_range")
    denoiser = network(config.schedule.prediction_type, 6 if learned else 3)
    chain = chain_from_scheduler(denoiser, X_T, scheduler, steps=steps, eta=eta, seed=3)
    exact(scheduler, config).set_timesteps(steps)
    assert torch.equal(chain.timesteps, scheduler.timesteps)
    x, latents = X_T, []
    for k, t in enumerate(scheduler.timesteps):
        noise = None if chain.noise is None else chain.noise[:, k]
        for module in (scheduling_ddpm, scheduling_ddpm_parallel):
            monkeypatch.setattr(module, "randn_tensor", lambda *args, noise=noise, **kwargs: noise)
        options = {} if config.is_ddpm else {"eta": eta or 0.0, "variance_noise": noise}
        x = scheduler.step(denoiser(x, t.expand(2)), t, x, **options).prev_sample
        latents.append(x)
    expected = torch.stack(latents, dim=1)
    assert bool(expected.isfinite().all())
    # From pure noise to another level with eta = 1, diffusers' 1 - a' - sigma^2 is 1e-17 where it is 0.
    atol = 1e-7 if eta and float(chain.transitions.alphas[0]) == 0 else 1e-9
    found = chain.sequential()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol)
    torch.testing.assert_close(chain.one_step(found), found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain(found), found, rtol=1e-8, atol=1e-8)
    return chain


COMMON: list[dict[str, Any]] = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.4},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
    {"thresholding": True, "sample_max_value": 0.7, "clip_sample": False},
    {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing", "prediction_type": "sample"},
    {"steps_offset": 1},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"trained_betas": [0.01 + 0.002 * i for i in range(60)], "num_train_timesteps": 60},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("options", [*COMMON, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}])
def test_steps_of_ddim(name: str, options: dict[str, Any], eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_steps_are_those_of(class_of(name)(**options), monkeypatch, eta=eta)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("options", COMMON)
def test_steps_of_ddpm(options: dict[str, Any], variance_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_steps_are_those_of(diffusers.DDPMScheduler(variance_type=variance_type, **options), monkeypatch)


def test_steps_of_the_other_ddpm_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_steps_are_those_of(diffusers.DDPMParallelScheduler(variance_type="fixed_large"), monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {},  # clip_sample=True, which the class has no code for
        {"snr_shift_scale": 1.0, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"set_alpha_to_one": False, "beta_schedule": "linear", "prediction_type": "sample"},
    ],
)
def test_steps_of_cogvideox(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chain = assert_steps_are_those_of(diffusers.CogVideoXDDIMScheduler(**options), monkeypatch)
    assert chain.noise is None


def test_a_ddpm_scheduler_without_all_of_its_noise_steps_as_ddim() -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="linspace")
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    for eta in (0.0, 0.5):
        found, expected = (
            chain_from_scheduler(network("epsilon", 3), X_T, each, steps=7, eta=eta) for each in (scheduler, ddim)
        )
        torch.testing.assert_close(found.sequential(), expected.sequential(), rtol=1e-12, atol=1e-12)


def test_eta_one_is_ddpm_where_clipped_images_give_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler()
    expected = assert_steps_are_those_of(scheduler, monkeypatch, steps=10).sequential()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    found = StochasticDDIMChain(
        network("epsilon", 3), X_T, schedule, steps=10, eta=1.0, seed=3, noise_from_clipped=True
    )
    torch.testing.assert_close(found.sequential(), expected, rtol=1e-9, atol=1e-9)
    plain = StochasticDDIMChain(network("epsilon", 3), X_T, schedule, steps=10, eta=1.0, seed=3)
    assert not torch.allclose(plain.sequential(), expected, atol=1e-2)


def test_learned_variance_is_solved_in_parallel() -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    chain = chain_from_scheduler(network("epsilon", 6), X_T, config, steps=8)
    expected = chain.sequential()
    for solver in (fixpoint.Picard(), fixpoint.CausalQuasiNewton()):
        result = sample(chain, solver=solver, rtol=1e-9)
        torch.testing.assert_close(result.trajectory, expected, rtol=1e-6, atol=1e-6)


def test_variances_of_ddpm_need_all_of_its_noise() -> None:
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match=r"variance_type='fixed_large' is DDPM's and needs eta=1, got eta=0\.5"):
        Transitions.of(schedule, schedule.timesteps(5), eta=0.5, variance_type="fixed_large")


def test_a_learned_variance_that_is_not_there_is_missed() -> None:
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    chain = chain_from_scheduler(network("epsilon", 3), X_T, config, steps=8)
    with pytest.raises(ValueError, match=r"(2, 6, 4|twice the channels)"):
        chain.sequential()


# Clipping is not lost


@pytest.mark.parametrize("options", [{}, {"thresholding": True, "sample_max_value": 1.5}, {"clip_sample_range": 0.5}])
def test_chains_of_a_schedule_clip_as_its_scheduler_does(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a number of steps where each arrives at the level that the next starts from."""
    scheduler = diffusers.DDIMScheduler(**options)
    expected = assert_steps_are_those_of(scheduler, monkeypatch, steps=10).sequential()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    chain = DDIMChain(network("epsilon", 3), X_T, schedule, steps=10)
    torch.testing.assert_close(chain.sequential(), expected, rtol=1e-9, atol=1e-9)
    free = DDIMChain(network("epsilon", 3), X_T, schedule, steps=10, clip_sample=float("inf"))
    assert float(free.sequential()[:, -1].abs().max()) > 2 > float(expected[:, -1].abs().max())


def test_what_becomes_of_predictions_is_read() -> None:
    def hook(**options: Any) -> Any:
        return NoiseSchedule.from_diffusers(options).x0_hook

    assert hook() == Clip(1.0)  # the default of DDIMScheduler
    assert hook(clip_sample=False) is None
    assert hook(clip_sample_range=2) == Clip(2)
    assert hook(thresholding=True, sample_max_value=2.0) == DynamicThreshold(0.995, 2.0)
    assert hook(_class_name="EulerDiscreteScheduler", clip_sample=True) is None  # no key of its own
    assert hook(_class_name="HeunDiscreteScheduler", clip_sample=True) == Clip(1.0)
    assert hook(_class_name="DPMSolverMultistepScheduler", thresholding=True) == DynamicThreshold(0.995, 1.0)


# Hooks


def projection(x_0: Tensor, step: Tensor, sample: Tensor) -> Tensor:
    """As restoration does: what is known of each sample replaces what is predicted, less and less towards the end."""
    known = torch.tensor([[0.3], [-0.8]], dtype=x_0.dtype)[sample]
    weight = (1 - step.to(x_0.dtype) / 10).reshape(-1, 1)
    first = weight * known + (1 - weight) * x_0[:, 0]
    return torch.cat([first.unsqueeze(1), x_0[:, 1:]], dim=1)


@pytest.mark.parametrize("entries", [1, 2**20])
def test_a_hook_changes_the_image_between_prediction_and_step(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """By the rule of DDIM, written out; all forms of the chain agree, and so do parallel solves.

    The cumulative form sums as many steps at a time as have so many entries.
    """
    monkeypatch.setattr("fixpoint_diffusion.processes.transitions._PART", entries)
    schedule = NoiseSchedule.linear()
    denoiser = network("epsilon", 3)
    chain = DDIMChain(denoiser, X_T, schedule, steps=8, x0_hook=projection)
    x, latents = X_T, []
    for k, t in enumerate(chain.timesteps):
        a, b = chain.transitions.alphas[k], chain.transitions.alphas_prev[k]
        eps = denoiser(x, t.expand(2))
        image = projection((x - (1 - a).sqrt() * eps) / a.sqrt(), torch.tensor([k, k]), torch.tensor([0, 1]))
        x = b.sqrt() * image + (1 - b).sqrt() * eps
        latents.append(x)
    expected = torch.stack(latents, dim=1)
    torch.testing.assert_close(chain.sequential(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chain(expected), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain.one_step(expected), expected, rtol=1e-9, atol=1e-9)
    rows, steps = torch.tensor([1, 0, 1]), torch.tensor([5, 2, 0])
    before = torch.stack([expected[1, 4], expected[0, 1], X_T[1]])
    after = torch.stack([expected[1, 5], expected[0, 2], expected[1, 0]])
    torch.testing.assert_close(chain.transition(before, rows, steps), after, rtol=1e-10, atol=1e-10)
    for solver in (fixpoint.Picard(), fixpoint.CausalQuasiNewton()):
        result = sample(chain, solver=solver, rtol=1e-10)
        torch.testing.assert_close(result.trajectory, expected, rtol=1e-6, atol=1e-6)


def test_a_hook_must_return_what_it_was_given() -> None:
    chain = DDIMChain(network("epsilon", 3), X_T, NoiseSchedule.linear(), steps=3, x0_hook=lambda x_0, k, i: x_0[:1])
    with pytest.raises(ValueError, match=r"x0_hook must return a tensor of the shape of its input \(2, 3, 4\)"):
        chain.sequential()


def test_thresholding_takes_more_entries_than_torch_sorts_into_quantiles() -> None:
    x_0 = torch.linspace(-3, 3, 2**24 + 2).reshape(2, 1, -1)
    row = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x_0.flatten(), 0.5)
    found = DynamicThreshold(0.5, 4.0)(x_0, row, row)
    torch.testing.assert_close(float(found[0, 0, -1]), float(x_0[0, 0, -1] / 1.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("ratio", "max_value"), [(1.5, 1.0), (float("nan"), 1.0), (0.9, 0.0)])
def test_thresholds_that_make_no_sense_are_refused(ratio: float, max_value: float) -> None:
    with pytest.raises(ValueError, match=r"(dynamic_thresholding_ratio must|sample_max_value must)"):
        DynamicThreshold(ratio, max_value)


# The process of other solvers


@pytest.mark.parametrize("name", SOLVER_CLASSES)
@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "scaled_linear", "beta_end": 0.015}, {"trained_betas": [0.1, 0.3]}]
)
def test_other_solvers_describe_their_process(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "trained_betas" in options:
        options = options | {"num_train_timesteps": 2}
    scheduler = class_of(name)(**options)
    scheduler.save_pretrained(tmp_path)
    for source in (scheduler, scheduler.config, tmp_path):
        config = SamplerConfig.from_diffusers(source)
        found = config.schedule.alphas_cumprod
        torch.testing.assert_close(found.float(), scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)
        assert config.schedule.x0_hook is None
        assert not config.own_steps


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_of_other_solvers(name: str) -> None:
    scheduler = class_of(name)(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    found = NoiseSchedule.from_diffusers(scheduler).alphas_cumprod
    torch.testing.assert_close(found.float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert float(found[-1]) == 0  # diffusers has 2**-24 there, for it divides by it


def test_a_solvers_last_level_is_read() -> None:
    name = {"_class_name": "DPMSolverMultistepScheduler"}
    schedule = NoiseSchedule.from_diffusers(name | {"final_sigmas_type": "sigma_min"})
    assert schedule.final_alpha == float(schedule.alphas_cumprod[0])
    assert NoiseSchedule.from_diffusers(name).final_alpha == 1.0
    assert NoiseSchedule.from_diffusers({"_class_name": "PNDMScheduler"}).final_alpha < 1.0


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0}, "sigma_max=80.0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        ({"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),  # no key of DDIM
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule=\['linear'\]"),
        ({"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic'"),
        ({"predict_epsilon": False}, 'predict_epsilon=False cannot be honoured; expected prediction_type="sample"'),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ({"num_train_timesteps": 0}, "at least 1"),
        ({"clip_sample": "no"}, "clip_sample='no'"),
        ({"clip_sample_range": None}, "clip_sample_range=None"),
        ({"clip_sample_range": -1.0}, "positive number"),
        ({"beta_start": float("nan")}, "beta_start=nan"),
        ({"beta_start": -0.1, "beta_schedule": "scaled_linear"}, "must not be negative"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, r"shape \(2,\); expected \(3,\)"),
        ({"trained_betas": ["a"]}, "must be a list of numbers"),
        ({"snr_warp": 2.0}, "keys that no known scheduler has.*snr_warp=2.0"),
        ({"_class_name": 3}, "scheduler 3 is not known"),
        ({"shift": 3.0, "num_train_timesteps": 1000}, "shift=3.0"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NoiseSchedule.from_diffusers(config)
    assert "\n" not in str(caught.value)


def test_keys_of_other_classes_may_stand_as_diffusers_lets_them() -> None:
    """What the configuration beside Stable Diffusion XL's weights holds."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "tensor_format": "pt",
        "timestep_values": None,
    }
    schedule = NoiseSchedule.from_diffusers(config)
    assert torch.equal(schedule.alphas_cumprod, NoiseSchedule.scaled_linear().alphas_cumprod)
    assert (schedule.final_alpha, schedule.steps_offset, schedule.x0_hook) == (1.0, 1, None)


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_without_its_class_is_recognised_by_its_keys(name: str) -> None:
    config = class_of(name)().config
    assert "_class_name" not in config
    found = SamplerConfig.from_diffusers(config)
    same_kind = [group for group in (DDIM_CLASSES, DDPM_CLASSES, SOLVER_CLASSES) if name in group]
    assert found.class_name in same_kind[0] or CLASSES[found.class_name].keys() == CLASSES[name].keys()
    expected = SamplerConfig.from_diffusers(class_of(name)())
    assert torch.equal(found.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
    assert found.schedule.x0_hook == expected.schedule.x0_hook


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "IPNDMScheduler", "UnCLIPScheduler", "LCMScheduler", "RePaintScheduler"]
)
def test_the_config_of_another_process_is_refused_without_its_class_too(name: str) -> None:
    with pytest.raises(ValueError, match=r"(no _class_name|keys that no known)"):
        SamplerConfig.from_diffusers(class_of(name)().config)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000])
def test_files_that_hold_no_configuration_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"scheduler_config\.json (is not valid JSON|must hold a)"):
        SamplerConfig.from_diffusers(tmp_path)


# Timesteps


def test_whole_timesteps_in_float_are_the_same_chain() -> None:
    whole = torch.tensor([900, 333, 20])
    chains = [
        DDIMChain(network("epsilon", 3), X_T, NoiseSchedule.linear(), timesteps=t) for t in (whole, whole.float())
    ]
    assert torch.equal(chains[0].sequential(), chains[1].sequential())


def test_repeated_timesteps_give_a_short_message() -> None:
    timesteps = torch.arange(999, -1, -1).repeat_interleave(2)
    with pytest.raises(ValueError, match=r"within 0 \.\. 999; entry 1 of 2000 is 999, after 999") as caught:
        DDIMChain(network("epsilon", 3), X_T, NoiseSchedule.linear(), timesteps=timesteps)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("name", "served"), [("EulerDiscreteScheduler", True), ("DEISMultistepScheduler", False)])
def test_levels_that_are_refused_point_to_the_chain_that_takes_them(name: str, served: bool) -> None:
    config = {"_class_name": name, "use_karras_sigmas": True}
    with pytest.raises(ValueError, match="use_karras_sigmas=True cannot be honoured; expected False") as refused:
        SamplerConfig.from_diffusers(config)
    assert ("chain_from_scheduler" in str(refused.value)) == served
    if served:
        chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), config, steps=5)
