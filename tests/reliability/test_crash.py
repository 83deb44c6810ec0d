"""Crashes: killed, signalled or out of disk anywhere, the same command ends with the same weights, bit for bit."""

import json
import os
import random
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launch import launch
from tests.reliability.catalogue import ROOT, case
from tests.reliability.recipes import refused
from tests.reliability.runs import STEPS, Work, again, broken, judged, result, run_name, small_work, tried
from ticktune.files import verify_directory


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A recipe, and its run ``whole``, which nothing interrupts."""
    made = small_work(tmp_path_factory.mktemp("crash"))
    done = made.train("whole", f"trace={made.folder / 'trace'}")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def whole(work: Work) -> dict[str, Any]:
    return result(work.run("whole"))


@pytest.fixture(scope="module")
def stopped(work: Work) -> str:
    """A run that was killed after step 7: the checkpoints of steps 4 and 6 are there."""
    assert work.train("stopped", "KILL@ticktune.session.Session._show#7").returncode == -signal.SIGKILL
    assert [p.name for p in sorted(work.run("stopped").glob("checkpoints/*"))] == ["step-00000004", "step-00000006"]
    return "stopped"


@pytest.fixture
def name(work: Work, request: pytest.FixtureRequest) -> str:
    """A run of the test's own."""
    return run_name(request.node.name)


# Killed


@case("C1", "C15")
@pytest.mark.parametrize("step", [1, 4, 5, 8, 11, 12])
def test_killed_after_a_step_the_run_ends_the_same(step: int, work: Work, whole: dict[str, Any], name: str) -> None:
    wrong = tried(work, name, whole, f"KILL@ticktune.session.Session._show#{step}", code=-9)
    assert not wrong


@case("C15")
@pytest.mark.parametrize(
    "point",
    [
        "ticktune.train.steps._backward#16",  # between the micro-batches of step 8
        "ticktune.session.Session._account#8",  # a step that is not logged yet
        "ticktune.session.Session._evaluate#3",  # at the end of epoch 2
        "ticktune.session.Session._finish#1",
    ],
)
def test_killed_between_steps_the_run_ends_the_same(point: str, work: Work, whole: dict[str, Any], name: str) -> None:
    assert not tried(work, name, whole, f"KILL@{point}", code=-9)


@case("C1")
def test_killed_again_and_again_at_random_instants_the_run_ends_the_same(
    work: Work, whole: dict[str, Any], name: str
) -> None:
    draw = random.Random(7)
    for _ in range(4):
        with work.training(name) as process:
            time.sleep(draw.uniform(0.1, 1.0))
            process.send_signal(signal.SIGKILL)
            code = process.wait()
            assert not judged(work, name, code, process.text(2), code=code)
    assert not again(work, name, whole)
    assert [e["step"] for e in result(work.run(name))["log"] if "loss" in e] == list(range(1, STEPS + 1))


@case("C1", "C19")
def test_an_evaluation_that_a_stop_and_a_kill_interrupt_stands_in_the_log_once(
    work: Work, whole: dict[str, Any], name: str
) -> None:
    assert work.train(name, "TERM@ticktune.session.score#2").returncode == 143
    assert work.train(name, "KILL@ticktune.session.Session._account#1").returncode == -signal.SIGKILL
    assert not again(work, name, whole)


@case("C4", "C19")
def test_a_stop_in_the_last_evaluation_leaves_the_same_state(work: Work, whole: dict[str, Any], name: str) -> None:
    assert not tried(work, name, whole, "TERM@ticktune.session.score#4", code=143)


@case("C15")
def test_no_row_is_repeated_or_left_out(work: Work, name: str) -> None:
    rows = {}
    for run, kill in ((f"{name}-a", ""), (f"{name}-b", "KILL@ticktune.session.Session._show#7")):
        log = work.folder / f"{run}.rows"
        for plan in (kill, "") if kill else ("",):
            work.train(run, f"args@ticktune.session.micro_batches={log}", plan)
        rows[run] = [json.loads(line) for line in log.read_text().splitlines()]
    uninterrupted, killed = rows.values()
    # Killed after step 7, of which it had drawn the rows, it goes on after the checkpoint of step 6.
    assert killed[:7] == uninterrupted[:7]
    assert killed[-(STEPS - 6) :] == uninterrupted[6:]
    for epoch in range(3):
        assert sorted(sum(uninterrupted[4 * epoch : 4 * epoch + 4], [])) == list(range(29))


# Signalled


@case("C3")
@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("ticktune.train.steps._backward#16", 8),  # before its first micro-batch; the longest rows were the first call
        ("ticktune.train.steps._backward#21", 10),  # between its micro-batches
        ("ticktune.session.Session._account#11", 11),
    ],
)
def test_sigterm_in_a_step_finishes_it_saves_and_says_how_to_go_on(
    point: str, step: int, work: Work, whole: dict[str, Any], name: str
) -> None:
    with work.training(name, f"TERM@{point}") as process:
        done = process.completed(timeout=30)
    assert done.returncode == 143, done.stderr
    saved = work.run(name) / f"checkpoints/step-{step:08d}"
    place = re.escape(str(saved.relative_to(work.folder)))
    assert re.search(rf"stopped after step {step} of {STEPS}; saved as {place} in \d+\.\d s\n", done.stderr)
    verify_directory(saved)
    [command] = re.findall(r"to go on, run: ticktune (train .*)\n", done.stderr)
    assert command == f"train {work.recipe} output=runs/{name}"
    done = launch(*shlex.split(command), cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step} of {STEPS}" in done.stderr
    assert result(work.run(name)) == whole


@case("C4")
@pytest.mark.parametrize("point", ["write_adapter", "report_page", "RunFolder.update"])
def test_a_signal_while_the_result_is_written_comes_when_the_work_is_done(
    point: str, work: Work, whole: dict[str, Any], name: str
) -> None:
    number = 3 if point == "RunFolder.update" else 1  # it begins, it runs, it is complete
    done = work.train(name, f"TERM@ticktune.session.{point}#{number}")
    assert done.returncode == 0, done.stderr
    assert result(work.run(name)) == whole
    assert "when the work was done" in (ROOT / "docs/exit-codes.md").read_text(encoding="utf-8")


# A save


@case("C2", "C14")
@pytest.mark.parametrize("share", [0.28, 0.37, 0.52, 0.68, 0.83, 0.97])
def test_killed_while_writing_a_whole_state_is_left(share: float, work: Work, whole: dict[str, Any], name: str) -> None:
    number = int(share * len((work.folder / "trace").read_text().splitlines()))
    assert not tried(work, name, whole, f"KILL@disk#{number}", code=-9)


@case("C14")
@pytest.mark.parametrize("share", [0.42, 0.5, 0.58, 0.66])
def test_of_a_single_checkpoint_one_is_whole_at_every_instant(
    share: float, work: Work, whole: dict[str, Any], name: str
) -> None:
    number = int(share * len((work.folder / "trace").read_text().splitlines()))
    assert work.train(name, f"KILL@disk#{number}", words=("checkpoints.keep=1",)).returncode == -signal.SIGKILL
    kept = list(work.run(name).glob("checkpoints/step-*"))
    assert kept
    for path in kept:
        verify_directory(path)
        assert (path / "best.safetensors").is_file()
    assert not again(work, name, whole)


@case("C5")
@pytest.mark.parametrize("number", [2, 6, 17, 48, 70, 93, 115, 140])
def test_a_full_disk_is_said_and_costs_nothing(number: int, work: Work, whole: dict[str, Any], name: str) -> None:
    assert not tried(work, name, whole, f"ENOSPC@space#{number}", code=8)


@case("C5")
@pytest.mark.parametrize(("line", "step"), [(1, 0), (9, 7), (11, 8)])  # step 0 and 8: of an evaluation
def test_a_full_disk_under_the_log_ends_no_run_before_a_save_was_tried(
    line: int, step: int, work: Work, whole: dict[str, Any], name: str
) -> None:
    calls = [call.split("\t") for call in (work.folder / "trace").read_text().splitlines()]
    calls = [call for call in calls if call[1:3] != ["mkdir", str(work.folder / "runs")]]  # it is there now
    opened = [n for n, call in enumerate(calls, start=1) if call[1] == "open" and call[2].endswith("/metrics.jsonl")]
    done = work.train(name, f"ENOSPC@disk#{opened[2 * line - 2]}")  # each time seen twice: open, and its opener
    refused(done, 8, f"runs/{name}/metrics.jsonl: the disk is full")
    assert (work.run(name) / f"checkpoints/step-{step:08d}").is_dir()
    assert not broken(work.run(name))
    assert not again(work, name, whole)


def checkpoint_bytes(run: Path) -> int:
    """What the values of the newest checkpoint's tensors take."""
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    found = [load_file(newest / f"{name}.safetensors") for name in ("adapter", "optimizer", "best")]
    return sum(tensor.numel() * tensor.element_size() for file in found for tensor in file.values())


@case("C5")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_is_said_with_bytes_needed_and_free(number: int, work: Work, name: str) -> None:
    done = work.train(name, f"ENOSPC@safetensors.torch.save_file#{number}", "free=1234")
    place = f"runs/{name}/checkpoints/step-00000002"
    said = f"{place}: the disk is full (No space left on device): {checkpoint_bytes(work.run('whole')):,} bytes needed"
    refused(done, 8, f"{said}, 1,234 bytes free")


@case("C5")
def test_little_space_is_said_before_training(work: Work, whole: dict[str, Any], name: str) -> None:
    # AdamW's step counters aside, which the estimate leaves out.
    steps = len(load_file(work.run("whole") / "adapter/adapter.safetensors")) * 4
    size = checkpoint_bytes(work.run("whole")) - steps
    done = work.train(name, f"free={2 * size - 1}", "KILL@ticktune.session.Session._try_longest#1")
    said = f"warning: runs/{name}: {2 * size - 1:,} bytes free, and two checkpoints take about {2 * size:,}: free some"
    assert said in done.stderr
    done = work.train(name, f"free={2 * size}")
    assert "bytes free" not in done.stderr
    assert result(work.run(name)) == whole


@case("C5")
@pytest.mark.parametrize("size", [300, 2500, 9000])
def test_a_file_that_cannot_grow_is_a_full_disk(size: int, work: Work, whole: dict[str, Any], name: str) -> None:
    assert not tried(work, name, whole, f"fsize={size}", code=8)


@case("C5")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_messages_that_cannot_be_written_do_not_stop_the_work(work: Work, whole: dict[str, Any], name: str) -> None:
    assert work.train(name, "stderr=/dev/full", "TERM@ticktune.session.Session._show#5").returncode == 143
    assert work.train(name, "stderr=/dev/full").returncode == 0
    assert result(work.run(name)) == whole
    done = work.train(name, "stdout=/dev/full")  # complete already: what cannot be said is the result
    assert done.returncode == 8
    assert "error[resources]: standard output: it cannot be written: No space left on device" in done.stderr
