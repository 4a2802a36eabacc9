"""The experiments behind ``make demo``: what they compare, and that their figures are the runs' own."""

import dataclasses
import itertools

import pytest
import torch

import fixpoint
from fixpoint_diffusion.experiments import chains, fpdm
from fixpoint_diffusion.problems import ddim_chain, fpdm_layer, sddim_chain


@pytest.fixture(scope="module")
def short_chain():
    return chains.embedded_chain(steps=6, samples=2)


@pytest.fixture(scope="module")
def outcomes(short_chain):
    return chains.run_methods(short_chain)


def test_every_method_of_the_issue_is_compared_with_the_sequential_sampler(outcomes):
    methods = ["Causal quasi-Newton", "Picard", "Anderson, per sample", "Anderson, per timestep"]
    assert list(outcomes) == ["sequential", *methods]
    assert outcomes["sequential"].rounds == 6
    assert outcomes["sequential"].rows == 12


def test_errors_in_the_table_are_those_of_the_images(short_chain, outcomes):
    with torch.no_grad():
        reference = short_chain.sequential()[:, -1]
    for label, outcome in outcomes.items():
        expected = max(float((a - b).norm() / b.norm()) for a, b in zip(outcome.images, reference, strict=True))
        assert outcome.error == pytest.approx(expected, abs=1e-6), label
        assert outcome.error < 1e-2


def test_picard_is_exact_after_as_many_rounds_as_steps_and_pays_for_changed_rows_alone(outcomes):
    picard = outcomes["Picard"]
    assert picard.rounds <= 6
    # Round r evaluates at most the rows after the r - 1 exact ones.
    assert picard.rows <= 2 * sum(6 - r for r in range(6))


def test_method_table_holds_each_outcome_once(short_chain, outcomes):
    table = chains.method_table("chains", {"short": outcomes})
    assert [row[1] for row in table.rows] == list(outcomes)
    for row, outcome in zip(table.rows, outcomes.values(), strict=True):
        assert row[2:6] == (outcome.rounds, outcome.rows, outcome.seconds, outcome.error)


def test_errors_are_drawn_against_every_cost_for_every_method(short_chain, outcomes):
    *charts, bars = chains.method_pictures(short_chain, outcomes)[:4]
    totals = (lambda o: o.rounds, lambda o: o.rows, lambda o: o.seconds)
    for chart, total in zip(charts, totals, strict=True):
        assert set(chart.series) == set(outcomes) - {"sequential"}
        assert list(chart.marks.values()) == [total(outcomes["sequential"])]
        for label, (costs, errors) in chart.series.items():
            assert list(costs) == sorted(costs)
            assert costs[-1] <= total(outcomes[label])
            assert errors[-1] == pytest.approx(outcomes[label].error, abs=1e-5)
            assert errors[0] > 10 * errors[-1]
    assert bars.values == {label: outcome.seconds for label, outcome in outcomes.items()}
    assert bars.reference == "sequential"


def test_pictures_show_images_and_the_latents_from_the_start_to_the_result(short_chain, outcomes):
    grid, causal, anderson = chains.method_pictures(short_chain, outcomes)[4:]
    assert tuple(grid.shape[:2]) == (5, 2)
    for strip, label in ((causal, "Causal quasi-Newton"), (anderson, "Anderson, per sample")):
        assert strip.column_labels[-1] == "x_0"
        left = [int(name.removeprefix("x_")) for name in strip.column_labels]  # steps that are left
        assert left == sorted(set(left), reverse=True)
        assert strip.row_labels[0] == "round 1"
        result = chains.bench.Images.of("x_0", outcomes[label].images[None, :1], low=-2, high=2).array()
        assert torch.equal(strip.array()[-1, -1], result[0, 0])
    for outcome in outcomes.values():
        assert not outcome.after or max(outcome.latents) == len(outcome.after)
    # Before anything is solved every latent is x_T.
    first = anderson.array()[0]
    assert (first == first[:1]).all()


def test_the_headline_says_what_the_run_measured(short_chain, outcomes):
    sequential, causal = (
        dataclasses.replace(outcomes[label], seconds=s) for label, s in zip(outcomes, (9.0, 2.0), strict=False)
    )
    causal = dataclasses.replace(causal, rounds=4, error=3.6e-4)
    found = chains.headline(short_chain, {"sequential": sequential, "Causal quasi-Newton": causal})
    assert found == "6 steps in 4 rounds, 4.5 times as fast as one step after another, error of x_0 4e-04."
    failed = dataclasses.replace(causal, converged="1 of 2")
    found = chains.headline(short_chain, {"sequential": sequential, "Causal quasi-Newton": failed})
    assert found.endswith("error of x_0 4e-04, only 1 of 2 samples converged.")


def test_starts_are_compared_for_both_solvers(short_chain):
    table, lines = chains.start_blocks(short_chain)
    labels = [f"{solver} from {init}" for solver in ("Anderson", "Picard") for init in ("x_T", "zeros")]
    assert [row[1] for row in table.rows] == labels
    assert set(lines.series) == set(labels)


def test_inverted_digits_come_back_and_their_noise_is_shown():
    chain = chains.embedded_chain(steps=10, samples=2)
    table, pictures = chains.inversion_blocks(chain)
    figures = {row[0]: row[1:] for row in table.rows}
    assert figures["plain DDIM"][:2] == (10, 20)
    assert figures["all steps at once"][2] < figures["plain DDIM"][2] / 2
    assert tuple(pictures.shape[:2]) == (4, 2)
    images, noise, back, plain = (row.double() for row in pictures.array())
    assert abs(back - images).mean() < abs(plain - images).mean() < abs(noise - images).mean()


def test_layer_evaluations_are_those_of_separate_solves_and_reuse_starts_nearer():
    study = fpdm.fpdm_study(quick=True)
    summary = study.main_table
    assert summary is not None
    assert [tuple(row[:2]) for row in summary.rows] == list(itertools.product(fpdm.SOLVERS, fpdm.STARTS))
    figures = {tuple(row[:2]): row[2:5] for row in summary.rows}
    for solver in fpdm.SOLVERS:
        cold, reused = figures[solver, "without reuse"], figures[solver, "with reuse"]
        assert list(cold) == sorted(cold)
        assert reused[0] < cold[0]
    assert figures["Anderson", "without reuse"][2] < figures["Picard", "without reuse"][2]
    assert len(next(block for block in study.blocks if "each timestep" in block.title).rows) == 9
    images = study.blocks[-1]
    assert len(images.row_labels) == 8


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        (ddim_chain, {"steps": 5, "samples": 2}),
        (sddim_chain, {"steps": 5, "samples": 2, "eta": 0.5}),
        (fpdm_layer, {"timestep": 300, "samples": 2}),
    ],
)
def test_registered_problems_are_solved_by_any_solver(entry, options):
    for solver in (fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden()):
        solution = fixpoint.solve(entry(**options), solver=solver, backward=None, rtol=1e-3)
        assert solution.converged.all()


def test_registered_layer_refuses_a_timestep_outside_the_schedule():
    with pytest.raises(ValueError, match="timestep must be from 0 to 999, got 1000"):
        fpdm_layer(timestep=1000)
