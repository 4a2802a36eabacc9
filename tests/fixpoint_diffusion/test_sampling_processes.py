"""Many images by several processes, what happens when one ends, and when two runs meet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fixpoint_diffusion.command_line import contents, run_main, sampled
from tests.fixpoint_diffusion.processes import ROOT, ended, start_ranks, wait_for

# The command, of which the process that comes to image 2 waits there to be killed.
WAITING = """
import sys, time
from pathlib import Path
from fixpoint_diffusion.cli import main
from fixpoint_diffusion.sampling.job import SamplingJob
from tests.fixpoint_diffusion.processes import threads_of_gloo
original = SamplingJob._sample
def sample(self, samples, **how):
    if samples[0] == 2:
        Path(sys.argv[sys.argv.index("--out") + 1], ".waiting").touch()
        time.sleep(600)
    return original(self, samples, **how)
SamplingJob._sample = sample
try:
    main()
finally:
    print("left:", threads_of_gloo(), flush=True)
"""


@pytest.mark.parametrize(("size", "rank"), [("2", None), ("x", "0"), ("", None)])
def test_an_environment_that_torchrun_does_not_make_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, rank: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    code, error = run_main(*command(tmp_path / "out"))
    assert code == 2
    said = "no RANK" if rank is None else f"RANK={rank}"
    assert error == (
        f"Error: the environment says WORLD_SIZE={size} and {said}: start with torchrun, or unset WORLD_SIZE"
    )
    assert not (tmp_path / "out").exists()


def command(out: Path, *more: object) -> list[object]:
    return ["sample", "--steps", 3, "--num-images", 9, "--batch-size", 2, "--out", out, *more]


def images(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name.startswith("images/")}


def test_of_four_processes_one_is_killed_and_two_go_on_without_losing_an_image(tmp_path: Path) -> None:
    whole = sampled(tmp_path / "whole", "--num-images", 9, "--batch-size", 2)
    out = tmp_path / "out"
    ranks = start_ranks(4, "-c", WAITING, *command(out))
    wait_for(out / ".waiting")
    for first in (4, 6, 8):  # the others have done their shares, and wait for this one
        wait_for(out / "batches" / f"0000000{first}.json")
    code, error = run_main(*command(out))
    assert code == 2
    assert error == f"Error: another run is sampling in {out}: wait for it, or choose another folder"
    ranks[1].kill()
    found = ended(ranks)
    assert [code for code, _, _ in found] == [2, -signal.SIGKILL, 2, 2]
    assert {out for code, out, _ in found if code == 2} == {"left: []\n"}
    assert {error for code, _, error in found if code == 2} == {
        "Error: another process of this command has ended; the same command goes on"
    }
    there = images(out)
    assert sorted(there) == [f"images/0000000{first}.npy" for first in (0, 4, 6, 8)]
    assert there.items() <= images(tmp_path / "whole").items()
    (out / ".waiting").unlink()
    (out / "images" / ".00000002.npy.0.part").touch()  # of a process that was killed as it wrote

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    again = [*torchrun, "-m", "fixpoint_diffusion", *map(str, command(out))]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 images are there already") == done.stdout.count("written to") == 1
    one, other = contents(tmp_path / "whole"), contents(out)
    assert one.keys() == other.keys()
    assert {n: c for n, c in one.items() if ".json" not in n} == {n: c for n, c in other.items() if ".json" not in n}
    record = json.loads((out / "sample.json").read_text())
    assert {**record, "seconds": 0} == {**whole, "seconds": 0}


# The command, whose processes take a second to say what is wrong.
SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from fixpoint_diffusion import cli
stop = cli.stop
def stop_later(message):
    time.sleep(1)
    stop(message)
cli.stop = stop_later
cli.main()
"""


def test_the_process_that_failed_says_why_before_torchrun_ends_it(tmp_path: Path) -> None:
    """In work within work of all, rank 0 said that rank 1 had failed, and rank 1 that rank 0 had: nobody said why.

    And the others ended at once, whereupon torchrun ended the one that had something to say.
    """
    images = np.linspace(-1, 1, 12 * 64, dtype=np.float32).reshape(12, 1, 8, 8)
    images[7] = np.nan
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "slow.py").write_text(SLOW)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    evaluate = [tmp_path / "slow.py", "evaluate", tmp_path / "images.npy", "digits", "--batch-size", "6"]
    done = subprocess.run([*torchrun, *evaluate], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert told == [f"Error: {tmp_path / 'images.npy'}: images must be finite, got infinities or NaNs"]


# Of the first of several commands, the second process finds no room: a limit on the size of a file fails as a full disk
# does.
IN_TURN = """
import json, os, resource, sys
from tests.fixpoint_diffusion.processes import run_in_turn
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
def prepare(turn):
    full = turn == 0 and os.environ["RANK"] == "1"
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, unlimited[1]) if full else unlimited)
run_in_turn(json.loads(sys.argv[1]), prepare)
"""


def test_two_processes_end_alike_and_speak_with_one_voice(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    samples = np.random.default_rng(0).uniform(-1, 1, (150, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "samples.npy", samples)
    judged = ["evaluate", tmp_path / "samples.npy", "digits", "--batch-size", 40]
    judged += ["--metric", "frechet", "--metric", "kernel"]
    commands = [command(out), command(out, "--seed", 7), command(out, "--model", "nowhere"), command(out)]
    commands.append([*judged, "--out", tmp_path / "two.json"])
    words = json.dumps([list(map(str, each)) for each in commands])
    (_, said, errors), (_, other_said, other_errors) = ended(start_ranks(2, "-c", IN_TURN, words))

    # The second process cannot write, the first refuses another run, and neither finds a model: whoever fails says it,
    # the first for both, and both end so.
    assert other_errors.startswith(f"Error: cannot write to {out / 'images'}")
    assert len(other_errors.splitlines()) == 1
    refused, unknown = errors.splitlines()
    assert refused.startswith(f"Error: {out} holds another run: seed is 0 there and 7 here")
    assert unknown.startswith("Error: no model folder 'nowhere'")
    assert other_said.splitlines() == ["code 2", "code 2", "code 2", "code 0", "code 0"]
    assert [line for line in said.splitlines() if "code" in line or "already" in line] == (
        ["code 2", "code 2", "code 2", "5 images are there already", "code 0", "code 0"]
    )
    sampled(whole, "--num-images", 9, "--batch-size", 2)
    assert images(out) == images(whole)

    code, _ = run_main(*judged, "--out", tmp_path / "one.json")
    assert code == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for name in ("frechet", "kernel"):
        assert two["figures"][name]["value"] == pytest.approx(one["figures"][name]["value"], rel=1e-6)
        assert two["figures"][name]["interval"] == pytest.approx(one["figures"][name]["interval"], rel=1e-6)
    del one["figures"], two["figures"]
    assert one == two


def test_a_disk_that_fills_up_keeps_whole_batches(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k,nr_inodes=1000", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        options = ("--steps", 3, "--num-images", 40, "--batch-size", 4, "--format", "png", "--out", disk / "out")
        code, error = run_main("sample", *options)
        assert code == 2
        assert "No space left on device" in error
        assert "\n" not in error
        done = len(list((disk / "out" / "batches").iterdir()))
        assert 0 < done < 10
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        figures = sampled(disk / "out", *options[2:-2])
        assert (figures["images_done"], figures["evals"]) == (40, 3 * 40)
        sampled(tmp_path / "whole", *options[2:-2])
        assert images(disk / "out") == images(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_gaps_are_filled_and_what_overlaps_is_made_again(tmp_path: Path) -> None:
    sampled(tmp_path / "whole", "--num-images", 9, "--batch-size", 2)
    sampled(tmp_path / "out", "--num-images", 9, "--batch-size", 2)
    (tmp_path / "out" / "images" / "00000002.npy").unlink()  # lost
    (tmp_path / "out" / "batches" / "00000006.json").unlink()  # killed before it was written
    sampled(tmp_path / "other", "--num-images", 9, "--batch-size", 3)
    for name in ("images/00000003.npy", "batches/00000003.json"):  # of a process that has outlived its run
        (tmp_path / "other" / name).rename(tmp_path / "out" / name)
    figures = sampled(tmp_path / "out", "--num-images", 9, "--batch-size", 2)
    assert (figures["images_done"], figures["evals"]) == (9, 3 * 9)
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "out" / "images").iterdir())])
    expected = np.concatenate([np.load(path) for path in sorted((tmp_path / "whole" / "images").iterdir())])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_of_an_earlier_version_are_not_deleted(tmp_path: Path) -> None:
    sampled(tmp_path, "--num-images", 2)
    (tmp_path / "batches" / "00000000.json").unlink()
    (tmp_path / "batches").rmdir()
    before = contents(tmp_path)
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path)
    assert code == 2
    assert "holds images without checksums, of an earlier version" in error
    assert contents(tmp_path) == before
