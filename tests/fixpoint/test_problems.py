from __future__ import annotations

import sys
import types
import warnings
from importlib import metadata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fixpoint
from fixpoint.bench.problems import CLASSICAL
from fixpoint.bench.registry import find_problem, parse_spec

# Evaluations to relative residual 1e-5 of scale-free Anderson with 5 and 10 columns, as surveyed; None: more than 300.
SURVEY = {
    "linear": (34, 26),
    "linear:rho=0.99": (150, 72),
    "linear:rho=0.999": (None, 158),
    "tanh": (24, 24),
    "expansive": (26, 20),
    "linear:rho=0.99,scale=1e4": (149, 72),
    "linear:rho=0.99,scale=1e-4": (148, 72),
}


@pytest.fixture
def register(monkeypatch):
    """Register entry points for one test: ``register(name=object)``; an exception is raised when it is loaded."""

    def add(**contents):
        module = types.ModuleType("fake_plugin")
        entries = []
        for name, content in contents.items():
            if isinstance(content, Exception):
                entries.append(metadata.EntryPoint(name, f"missing_plugin_{name}:x", "fixpoint.problems"))
            else:
                setattr(module, name, content)
                entries.append(metadata.EntryPoint(name, f"fake_plugin:{name}", "fixpoint.problems"))
        monkeypatch.setitem(sys.modules, "fake_plugin", module)
        monkeypatch.setattr("fixpoint_cli.names.metadata.entry_points", lambda group: entries)

    return add


@settings(max_examples=20)
@given(rho=st.floats(0.05, 0.999), dim=st.integers(1, 40), seed=st.integers(0, 1000))
def test_linear_has_the_spectral_radius_it_is_asked_for_and_a_symmetric_matrix(rho, dim, seed):
    matrix = find_problem("linear")(rho=rho, dim=dim, seed=seed, dtype="float64").matrix.numpy()
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(matrix)).max(), rho, rtol=1e-9)


def test_expansive_has_the_spectrum_it_is_asked_for():
    matrix = find_problem("expansive")(low=-3.0, high=0.5, dim=30, dtype="float64").matrix.numpy()
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(matrix).real), np.linspace(-3, 0.5, 30), atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "expansive"])
def test_closed_form_solution_agrees_with_numpy_and_is_a_fixed_point(name):
    problem = find_problem(name)(dim=50, dtype="float64")
    expected = np.linalg.solve(np.eye(50) - problem.matrix.numpy(), problem.offset.numpy().T).T
    np.testing.assert_allclose(problem.solution.numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(problem(problem.solution), problem.solution, rtol=1e-10, atol=1e-10)


def test_scale_multiplies_the_solution_and_nothing_else():
    small, large = find_problem("linear")(dtype="float64"), find_problem("linear")(scale=1e4, dtype="float64")
    torch.testing.assert_close(large.matrix, small.matrix)
    torch.testing.assert_close(large.solution, 1e4 * small.solution)


def test_plain_iteration_diverges_on_expansive_and_follows_the_survey_where_it_contracts():
    diverged = fixpoint.solve(
        fixpoint.load_problem("expansive"), solver=fixpoint.Picard(), max_evals=200, on_failure="ignore"
    )
    assert not diverged.converged.any()
    for name, surveyed in (("linear", 85), ("tanh", 27)):
        problems = [fixpoint.load_problem(f"{name}:seed={seed}") for seed in range(8)]
        counts = [fixpoint.solve(p, solver=fixpoint.Picard(), rtol=1e-5, max_evals=300).nfev for p in problems]
        assert np.median(counts) == pytest.approx(surveyed, rel=0.1)


def test_the_survey_covers_the_classical_problems():
    assert set(SURVEY) == set(CLASSICAL)


@pytest.mark.parametrize("spec", CLASSICAL)
def test_anderson_needs_at_most_the_surveyed_evaluations(spec):
    for memory, surveyed in zip((5, 10), SURVEY[spec], strict=True):
        sol = fixpoint.solve(
            fixpoint.load_problem(spec),
            solver=fixpoint.Anderson(memory=memory),
            rtol=1e-5,
            max_evals=300,
            on_failure="raise" if surveyed else "ignore",
        )
        assert sol.nfev <= 1.1 * (surveyed or 300)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("linear:rho=1.5", "rho must lie in"),
        ("linear:dim=0", "dim must be at least 1"),
        ("linear:dtype=int64", "floating point"),
        ("linear:dtype=nonsense", "floating point"),
        ("expansive:high=2", "low <= high < 1"),
    ],
)
def test_an_illegal_value_is_refused_with_what_was_expected(spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        fixpoint.load_problem(spec)


def test_unknown_names_and_options_come_with_a_suggestion():
    with pytest.raises(LookupError, match=r"unknown problem 'linaer'. Did you mean 'linear'"):
        fixpoint.load_problem("linaer")
    with pytest.raises(TypeError, match=r"problem 'linear' has no option 'roh'. Did you mean 'rho'\? Legal: .*seed"):
        fixpoint.load_problem("linear:roh=0.5")
    with pytest.raises(TypeError, match="no option 'sede'"):
        find_problem("linear")(sede=1)


def test_same_seed_same_problem_and_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    first, second, other = (find_problem("tanh")(dim=9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_broken_registration_is_named_and_does_not_hide_the_others(register):
    good = fixpoint.RegisteredProblem(lambda: None, "good")
    register(broken=ImportError(), good=good, wrong=42)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fixpoint.available_problems()
    assert found == {"good": good}
    assert [str(w.message).partition(":")[0] for w in caught] == [
        f"problem {name!r} could not be loaded" for name in ("broken", "wrong")
    ]


def test_loading_one_problem_imports_no_other(register):
    register(broken=ImportError(), good=fixpoint.RegisteredProblem(lambda *, size=2: torch.zeros(size), "good"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fixpoint.load_problem("good:size=3").shape == (3,)


def test_a_registration_of_another_type_is_refused(register):
    register(wrong=42)
    with pytest.raises(TypeError, match=r"fake_plugin:wrong must be a fixpoint.RegisteredProblem, found int"):
        find_problem("wrong")


def test_options_of_a_factory_with_open_keywords_are_its_own_affair(register):
    register(open=fixpoint.RegisteredProblem(lambda **options: options, "open"))
    assert fixpoint.load_problem("open:anything=1") == {"anything": 1}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.sampled_from(["float64", "a-b", "x.y"])),
    )
)
def test_a_spec_gives_back_the_options_that_it_was_written_from(options):
    written = ",".join(f"{key}={value}" for key, value in options.items())
    name, parsed = parse_spec(f"some-name:{written}" if options else "some-name")
    assert name == "some-name"
    assert parsed == options
    assert [type(value) for value in parsed.values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize("spec", ["", ":a=1", "name:", "linear:a", "name:a=", "name:=1", "name:a=1,,b=2"])
def test_a_malformed_spec_is_refused(spec):
    with pytest.raises(ValueError, match="expected name:key=value"):
        parse_spec(spec)


def test_an_option_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match=r"option 'rho' stands twice in 'linear:rho=0.5, rho=0.6'"):
        parse_spec("linear:rho=0.5, rho=0.6")
