"""``fixpoint-diffusion sample`` with the options of an FPDM's layer: images equal those of Python calls to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import sample
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.denoisers import FPDMDenoiser, Guided, load_denoiser
from fixpoint_diffusion.models import allocate
from fixpoint_diffusion.options.sampling import SamplingOptions, flag
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import ToTolerance, adaptive_tolerance, sample_fpdm, sample_fpdm_jointly
from fixpoint_diffusion.sampling.fpdm.job import refuse_fpdm_options
from tests.fixpoint_diffusion.command_line import SCHEDULE, contents, run_main, sampled, saved_fpdm

STEPS, IMAGES = 5, 3
CONFIG = {
    **SCHEDULE,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.fixture
def fpdm(tmp_path: Path) -> Path:
    folder = saved_fpdm(tmp_path / "fpdm", n_pre=2, implicit_blocks=2)
    (folder / "scheduler_config.json").write_text(json.dumps(CONFIG))
    return folder


def noise(count: int = IMAGES) -> Tensor:
    return initial_noise(0, range(count), (1, 8, 8))


def by_command(out: Path, model: Path, *options: object) -> tuple[Tensor, dict]:
    figures = sampled(out, "--model", model, "--num-images", IMAGES, "--steps", STEPS, *options)
    return torch.from_numpy(np.load(out / "images.npy")), figures


@pytest.mark.parametrize(
    ("typed", "options", "passes"),
    [
        (("--iterations", "3"), {"iterations": 3}, 45),
        (("--iterations", "3,1,2,4,2"), {"iterations": (3, 1, 2, 4, 2)}, 39),
        (
            ("--iterations", "4", "--allocation", "increasing", "--slope", "1.5"),
            {"iterations": allocate(20, STEPS, "increasing", slope=1.5)},
            55,
        ),
        (("--allocation", "decreasing"), {"iterations": allocate(20, STEPS, "decreasing")}, 55),
        # 5 steps of 3 explicit blocks leave 23 passes of the group of 2
        (("--block-passes", "38"), {"iterations": allocate(11, STEPS)}, 37),
        (("--block-passes", "55", "--allocation", "increasing"), {"iterations": allocate(20, STEPS, "increasing")}, 55),
        (("--no-reuse",), {"iterations": 4, "reuse": False}, 55),
        (("--extrapolate",), {"iterations": 4, "reuse": "extrapolate"}, 55),
        (("--layer-solver", "anderson"), {"iterations": 4, "solver": fixpoint.Anderson()}, 55),
        (("--layer-solver", "broyden"), {"iterations": 4, "solver": fixpoint.Broyden()}, 55),
    ],
)
def test_a_count_of_iterations(
    tmp_path: Path, fpdm: Path, typed: tuple[str, ...], options: dict[str, Any], passes: int
) -> None:
    model = load_denoiser(fpdm).model
    images, figures = by_command(tmp_path / "out", fpdm, *typed, "--class", "0,2", "--guidance", 2, "--eta", 0.5)
    expected = sample_fpdm(
        model,
        noise(),
        NoiseSchedule.from_diffusers(CONFIG),
        steps=STEPS,
        y=torch.tensor([0, 2, 0]),
        guidance=2.0,
        eta=0.5,
        **options,
    )
    assert torch.equal(images, expected.images)
    assert figures["block_passes"] == expected.block_passes == passes
    assert figures["reuse"] == options.get("reuse", True)


@pytest.mark.parametrize("solver", [None, "picard"])
def test_a_tolerance_of_the_layer(tmp_path: Path, fpdm: Path, solver: str | None) -> None:
    typed = () if solver is None else ("--layer-solver", solver)
    guided = ("--class", "0,2", "--guidance", 2)
    images, figures = by_command(tmp_path / "out", fpdm, "--layer-rtol", 1e-3, *typed, *guided)
    options: dict[str, Any] = {} if solver is None else {"solver": fixpoint.Picard()}
    options |= {"y": torch.tensor([0, 2, 0]), "guidance": 2.0}
    model, until = load_denoiser(fpdm).model, ToTolerance(rtol=1e-3)
    schedule = NoiseSchedule.from_diffusers(CONFIG)
    expected = sample_fpdm(model, noise(), schedule, steps=STEPS, iterations=until, **options)
    assert torch.equal(images, expected.images)
    assert figures["mean_block_passes"] == pytest.approx(expected.block_passes, abs=1e-3)
    assert figures["converged"] == IMAGES
    assert figures["block_passes"] is None


def test_layers_that_miss_their_tolerance_are_counted(tmp_path: Path, fpdm: Path) -> None:
    code, errors = run_main(
        *("sample", "--model", fpdm, "--num-images", 2, "--steps", 2, "--layer-rtol", 1e-12, "--out", tmp_path / "out"),
        *("--class", "all"),
    )
    assert code == 0
    assert errors == "Warning: 2 of 2 images did not converge to --layer-rtol 1e-12"


@pytest.mark.parametrize("batch", [256, 2])
def test_adaptive_iterations_take_their_threshold_from_the_first_images(tmp_path: Path, fpdm: Path, batch: int) -> None:
    out, options = tmp_path / "out", ("--allocation", "adaptive", "--block-passes", 67, "--batch-size", batch)
    figures = sampled(out, "--model", fpdm, "--num-images", IMAGES, "--steps", STEPS, *options)
    model, schedule = load_denoiser(fpdm).model, NoiseSchedule.from_diffusers(CONFIG)
    until = adaptive_tolerance(model, noise(16), schedule, budget=26, steps=STEPS)
    assert figures["layer_atol"] == until.atol
    expected = [
        sample_fpdm(model, rows, schedule, steps=STEPS, iterations=until).images for rows in noise().split(batch)
    ]
    files = [out / "images.npy"] if batch > IMAGES else sorted((out / "images").iterdir())
    assert np.array_equal(np.concatenate([np.load(file) for file in files]), torch.cat(expected).numpy())
    assert figures["mean_block_passes"] == pytest.approx(67, rel=0.1)
    # What was found is no setting of another run: it goes on, to more images.
    again = sampled(out, "--model", fpdm, "--num-images", IMAGES + 1, "--steps", STEPS, *options)
    assert (again["images_done"], again["layer_atol"]) == (IMAGES + 1, until.atol)


def test_chain_and_layers_as_one_fixed_point(tmp_path: Path, fpdm: Path) -> None:
    labels = ("--class", "0,2", "--guidance", 2)
    images, figures = by_command(
        *(tmp_path / "out", fpdm, "--solver", "causal", "--reuse", "--iterations", 2, "--rtol", 1e-4),
        *("--max-rows", 7, "--eta", 0.5, *labels),
    )
    denoiser, schedule = load_denoiser(fpdm), NoiseSchedule.from_diffusers(CONFIG)
    options = {"steps": STEPS, "iterations": 2, "eta": 0.5, "y": torch.tensor([0, 2, 0]), "guidance": 2.0}
    solver = fixpoint.CausalQuasiNewton(max_rows=7)
    joint = sample_fpdm_jointly(
        denoiser.model, noise(), schedule, rtol=1e-4, solver=solver, prior=denoiser.prior, **options
    )
    assert torch.equal(images, joint.images)
    assert (figures["rounds"], figures["evals"], figures["converged"]) == (joint.rounds, joint.evals, IMAGES)
    assert figures["mean_block_passes"] == pytest.approx(joint.block_passes, abs=1e-3)
    assert figures["block_passes"] is None
    sampled(
        *(tmp_path / "parts", "--model", fpdm, "--num-images", IMAGES, "--steps", STEPS, "--batch-size", 2),
        *("--solver", "causal", "--reuse", "--iterations", 2, "--eta", 0.5, *labels),
    )
    parts = [np.load(file) for file in sorted((tmp_path / "parts" / "images").iterdir())]
    np.testing.assert_allclose(np.concatenate(parts), images, atol=1e-2)
    in_turn, _ = by_command(tmp_path / "in-turn", fpdm, "--iterations", 2, "--eta", 0.5, *labels)
    torch.testing.assert_close(images, in_turn, atol=1e-2, rtol=0)
    _, few = by_command(tmp_path / "few", fpdm, "--solver", "causal", "--reuse", "--max-rounds", 1)
    assert few["rounds"] == 1
    assert few["converged"] == 0


@pytest.mark.parametrize("solver", ["causal", "picard"])
def test_a_parallel_chain_solves_its_layers_inside(tmp_path: Path, fpdm: Path, solver: str) -> None:
    how = ("--layer-rtol", 1e-4, "--layer-solver", "broyden")
    images, _ = by_command(
        tmp_path / "out", fpdm, "--solver", solver, "--rtol", 1e-4, *how, "--class", 1, "--guidance", 2
    )
    loaded = load_denoiser(fpdm)
    denoiser = FPDMDenoiser(loaded.model, rtol=1e-4, solver=fixpoint.Broyden(), prior=loaded.prior)
    labels = {"class_labels": torch.ones(IMAGES, dtype=torch.int64)}
    chain = chain_from_scheduler(Guided(denoiser, 2.0), noise(), CONFIG, steps=STEPS, eta=0.0, conditioning=labels)
    by_name = {"causal": fixpoint.CausalQuasiNewton(), "picard": fixpoint.Picard()}
    assert torch.equal(images, sample(chain, solver=by_name[solver], rtol=1e-4).images)


@pytest.mark.parametrize("solver", ["causal", "picard"])
def test_block_passes_of_a_parallel_chain_count_every_evaluation(tmp_path: Path, fpdm: Path, solver: str) -> None:
    """Not only one of each step, which is what the sequential sampler takes."""
    _, figures = by_command(tmp_path / "out", fpdm, "--solver", solver, "--iterations", 4)
    assert figures["evals"] > STEPS * IMAGES
    assert figures["mean_block_passes"] == pytest.approx(figures["evals"] * (2 + 4 * 2 + 1) / IMAGES, abs=1e-3)
    assert figures["block_passes"] is None
    _, figures = by_command(tmp_path / "tolerance", fpdm, "--solver", solver, "--layer-rtol", 1e-2)
    assert figures["block_passes"] is None
    assert "mean_block_passes" not in figures


def test_options_of_earlier_runs_are_the_same_run(tmp_path: Path, fpdm: Path) -> None:
    """A record from before the further options existed is continued."""
    out = tmp_path / "out"
    by_command(out, fpdm)
    record = json.loads((out / "sample.json").read_text())
    for name in ("allocation", "slope", "layer_rtol", "layer_solver", "extrapolate", "no_clip"):
        del record[name]
    (out / "sample.json").write_text(json.dumps(record))
    assert by_command(out, fpdm)[1]["images_done"] == IMAGES


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--iterations", "x"), "expected a number, or one for each step"),
        (("--iterations", "4,4"), "--iterations lists 2 numbers; expected one for each of 5 steps"),
        (("--iterations", "4,4,0,4,4"), "--iterations must be from 1 to 10000, got 0"),
        (("--iterations", "4", "--block-passes", "50"), "--block-passes takes the place of --iterations"),
        (("--iterations", "4,4,4,4,4", "--allocation", "increasing"), "--allocation divides"),
        (("--iterations", "4", "--layer-rtol", "0.1"), "--layer-rtol decides how many iterations a step takes"),
        (("--allocation", "adaptive", "--layer-rtol", "0.1"), "leave out --allocation"),
        (("--allocation", "best"), "--allocation"),
        (("--allocation", "adaptive", "--iterations", "60"), "a budget of 300 iterations cannot be met"),
        (("--slope", "1"), "--slope is for --allocation increasing or decreasing"),
        (("--slope", "3", "--allocation", "increasing"), "--slope"),
        (("--block-passes", "20"), "is too few: one iteration in each of 5 steps takes 25"),
        (("--layer-rtol", "0"), "--layer-rtol"),
        (("--layer-solver", "newton"), "--layer-solver"),
        (("--extrapolate", "--no-reuse"), "--extrapolate is a way to reuse solutions"),
        (("--solver", "picard", "--reuse"), "--reuse needs steps that follow each other"),
        (("--solver", "causal", "--extrapolate"), "--extrapolate needs steps that follow each other"),
        (("--solver", "causal", "--iterations", "4,4,4,4,4"), "--iterations with a list needs steps"),
        (("--solver", "causal", "--allocation", "increasing"), "--allocation needs steps that follow each other"),
        (("--solver", "causal", "--block-passes", "50"), "--block-passes needs steps that follow each other"),
        (("--solver", "causal", "--reuse", "--layer-rtol", "0.1"), "--layer-rtol needs steps that follow each other"),
        (("--solver", "causal", "--reuse", "--layer-solver", "picard"), "--layer-solver needs steps"),
        (("--solver", "causal", "--reuse", "--max-rows", "auto"), "--max-rows auto times the model alone"),
    ],
)
def test_what_contradicts_itself_is_one_line_and_writes_nothing(
    tmp_path: Path, fpdm: Path, typed: tuple[str, ...], message: str
) -> None:
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    code, error = run_main("sample", "--model", fpdm, "--steps", STEPS, "--out", tmp_path / "out", *typed)
    assert code == 2
    assert message in error
    assert "\n" not in error
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_another_model_has_no_layer(tmp_path: Path) -> None:
    values = {"iterations": 4, "block_passes": 9, "allocation": "adaptive", "layer_rtol": 0.1}
    for name, value in {**values, "layer_solver": "picard", "reuse": False, "extrapolate": True}.items():
        options = SamplingOptions(**{name: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"only FPDM models have a layer to solve: leave out {flag(name)}$"):
            refuse_fpdm_options(options)
    refuse_fpdm_options(SamplingOptions())
    options = ("--allocation", "increasing", "--slope", 1, "--out", tmp_path / "out")
    code, error = run_main("sample", "--model", "ddpm-digits", *options)
    assert code == 2
    assert error == "Error: only FPDM models have a layer to solve: leave out --allocation and --slope"
    assert not (tmp_path / "out").exists()
