"""``pama report``: statistics, tables, figures, the HTML page, and reports of missing data."""

import html
import json
import math
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from pama_plugin.cli import main
from pama_plugin.errors import ConfigError
from pama_plugin.runs.logs import find_runs, read_run, read_scalars
from pama_plugin.runs.report import report_runs
from pama_plugin.runs.report.figures import draw_curves, draw_front, draw_paths
from pama_plugin.runs.report.front import find_front
from pama_plugin.runs.report.pareto import fifth, indicators, interval, nondominated, paired, starts, whole_mean
from pama_plugin.runs.report.tables import differences_table, front_table, objectives_table

NAMES = ("length", "sentiment")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty steps of two objectives; sentiment rises by 0.1 per step, length is constant at 1."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(1, 21):
            for name, reward, share in (("sentiment", 0.1 * step, 0.25), ("length", 1.0, 0.75)):
                writer.add_scalar(f"train/reward/{name}", reward, step)
                writer.add_scalar(f"train/pama/coefficient/{name}", share, step)
                writer.add_scalar(f"train/pama/gain/{name}", 0.5, step)
            for key in ("active_fraction", "conflict_rate", "rms"):
                writer.add_scalar(f"train/pama/{key}", 0.5, step)
    return tmp_path


def write_result(out: Path, rule: str, weights: str, seed: int, ends: tuple[float, float], start=(0.0, 0.0)) -> Path:
    """Ten steps of a run of a sweep: eight with the rewards ``start``, then two with the rewards ``ends``."""
    scalars = {}
    for name, first, last in zip(NAMES, start, ends):
        scalars[f"reward/{name}"] = [[step, first if step <= 8 else last] for step in range(1, 11)]
        scalars[f"reward_std/{name}"] = [[1, 2.0]]
        scalars[f"pama/coefficient/{name}"] = [[step, 0.5] for step in range(1, 11)]
    folder = out / f"{rule}{weights}-{seed}".replace(":", "-")
    folder.mkdir(parents=True)
    spec = {"arm": f"{rule} {weights}".rstrip(), "rule": rule, "seed": seed, "scalars": scalars}
    (folder / "result.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of rule a, which is on the front, and of rule b with two weights, one dominated by a."""
    for seed, nudge in ((1, 0.1), (2, -0.1)):
        write_result(tmp_path, "a", "", seed, (2.0 + nudge, 2.0))
        write_result(tmp_path, "b", "1:3", seed, (1.0, 3.0))
        write_result(tmp_path, "b", "3:1", seed, (1.5, 1.0 + nudge))
    return tmp_path


def test_a_fifth_ignores_nan() -> None:
    series = [(step, float(step)) for step in range(1, 11)]
    assert (fifth(series, last=False), fifth(series, last=True)) == (1.5, 9.5)
    assert fifth([*series, (11, math.nan)], last=True) == 9.5
    assert math.isnan(fifth([], last=True))


def test_an_interval_is_students() -> None:
    # t(.975, 4) = 2.776, s = 1.5811, √5 = 2.2361
    five = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert five.mean == 3.0 and five.half == pytest.approx(1.963, abs=1e-3) and five.excludes_zero
    assert not interval([-1.0, 1.0]).excludes_zero and not interval([5.0]).excludes_zero


def test_pairs_have_the_same_seed() -> None:
    difference = paired({1: 1.0, 2: 3.0, 9: 100.0}, {2: 2.0, 1: 0.0, 8: 50.0})
    assert difference == (1.0, 0.0, 2)


def test_indicators_by_hand() -> None:
    points, front = np.array([[1.0, 3.0], [1.5, 1.0]]), np.array([[2.0, 2.0], [1.0, 3.0]])
    # above (0, 0): 1·3 + (1.5 − 1)·1; IGD+: of (2, 2) min(1, √(.5² + 1)) = 1, of (1, 3) 0; ε: 1 from (1, 3) to (2, 2)
    assert indicators(points, front, [0.0, 0.0]) == pytest.approx((3.5, 0.5, 1.0))
    assert nondominated(np.array([[2.0, 2.0], [1.0, 3.0], [1.5, 1.0], [2.0, 2.0]])).tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_the_front_of_a_sweep_by_hand(sweep) -> None:
    runs, missing = find_runs([sweep])
    assert len(runs) == 6 and not missing
    rows = {row[0]: row[1:] for row in front_table(runs, NAMES, [0.0, 0.0]).rows}
    assert [arm for arm, row in rows.items() if row[0] == "yes"] == ["a", "b 1:3"]
    # worst rises in units of 2: (2.1, 2) and (1.9, 2) of a → 1.0, .95; t(.975, 1) = 12.706 · .0354 / √2
    assert rows["a"][1] == "0.975 ± 0.318"
    assert rows["a"][2] == "4.000 ± 2.541"  # 2.1·2 and 1.9·2: ± 12.706 · .2828 / √2
    # points of b: (1, 3), (1.5, 1.1) and (1.5, .9): 3 + .5·1.1 and 3 + .5·.9
    assert rows["b 1:3"][2] == "3.500 ± 0.635" and rows["b 3:1"][2:] == ["", "", ""]


def test_differences_by_hand(sweep) -> None:
    runs, _ = find_runs([sweep])
    grid = differences_table(runs, NAMES, "a")
    rows = {row[0]: row[1:] for row in grid.rows}
    assert grid.columns == ["arm", "seeds", "length", "sentiment", "worst rise"] and list(rows) == ["b 1:3", "b 3:1"]
    # seeds 1 and 2: length 1 − 2.1 and 1 − 1.9; ± 12.706 · .1414 / √2. Worst rises in units of 2: .5 − 1 and .5 − .95
    assert rows["b 1:3"] == ["2", "-1.000 ± 1.271", "1.000 ± 0.000 *", "-0.475 ± 0.318 *"]
    # Mean over all ten steps, of which eight have the start rewards: a fifth of the difference.
    whole = differences_table(runs, NAMES, "a", whole_mean, "mean over all steps")
    assert whole.rows[0][2:4] == ["-0.200 ± 0.254", "0.200 ± 0.000 *"] and whole.caption.startswith("Mean over all")
    with pytest.raises(ConfigError, match="--baseline .*a, b 1:3, b 3:1.* found 'c'"):
        differences_table(runs, NAMES, "c")
    with pytest.raises(ConfigError, match="--baseline .*per arm and seed.* found 'a' with 1, 2, 1"):
        differences_table([*runs, runs[0]], NAMES, "a")


def test_a_reward_that_is_always_nan_gives_no_difference(sweep) -> None:
    runs, _ = find_runs([sweep])
    broken = [replace(run, scalars=run.scalars | {"reward/sentiment": [(1, math.nan)]}) for run in runs]
    rows = differences_table(broken, NAMES, "a").rows
    assert rows[0][1:] == ["2", "-1.000 ± 1.271", "–", "–"]


def test_objectives_by_hand(sweep) -> None:
    rows = {tuple(row[:2]): row[2:] for row in objectives_table(find_runs([sweep])[0]).rows}
    assert rows["b 1:3", "sentiment"] == ["0.000 ± 0.000", "3.000 ± 0.000", "3.000 ± 0.000", "0.500", "–", "–"]


def test_the_command_on_one_run(folder, capsys) -> None:
    main(["report", str(folder)])
    printed = capsys.readouterr().out
    # four steps each: (.1 + … + .4) / 4 and (1.7 + … + 2.0) / 4
    assert all(text in printed for text in ("sentiment", "0.250", "1.850", "1.600", "0.750"))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and "report.html" in printed


def test_the_page_of_a_sweep_needs_no_other_file(sweep, tmp_path, capsys) -> None:
    (sweep / "gone").mkdir()
    (sweep / "gone" / "run.json").write_text('{"arm": "<b>", "rule": "x", "seed": 1}')
    main(
        [
            "report",
            str(sweep),
            "--out",
            str(tmp_path / "out"),
            "--reference",
            "length=0",
            "sentiment=0",
            "--baseline",
            "a",
        ]
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page and "3.500 ± 0.635" in page
    assert "against a" in page
    assert "no TensorBoard events in" in page and "no TensorBoard events in" in capsys.readouterr().out


def test_problems_of_unfinished_and_broken_runs(folder) -> None:
    (folder / "run.json").write_text('{"arm": "a", "rule": "a", "seed": 1}')
    assert read_run(folder).problems == ("not finished, 20 steps so far",)
    with SummaryWriter(str(folder / "later")) as writer:
        writer.add_scalar("train/pama/coefficient/a", 1.0, 1)
        writer.add_scalar("train/pama/coefficient/b", 1.0, 1)
        writer.add_scalar("train/reward/b", math.nan, 1)
    problems = read_run(folder).problems
    assert problems[1:] == ("reward/a is not logged", "reward/b is not a number in 1 of 1 steps")
    main(["report", str(folder)])


def test_steps_that_a_resumed_run_repeats_count_once(folder) -> None:
    with SummaryWriter(str(folder / "run"), filename_suffix=".later") as writer:
        for step in (20, 21):
            writer.add_scalar("train/reward/length", 5.0, step)
            writer.add_scalar("train/pama/coefficient/length", 0.75, step)
    series = read_scalars(folder)["reward/length"]
    assert [step for step, _ in series] == list(range(1, 22)) and series[-2:] == [(20, 5.0), (21, 5.0)]


def log(folder: Path, name: str, steps: range, *, stock: bool = False) -> None:
    """A log of OpenRLHF's, in a folder of its own, whose reward is a tenth of the step."""
    with SummaryWriter(str(folder / name)) as writer:
        for step in steps:
            writer.add_scalar("train/reward/a", step / 10, step)
            if not stock:
                writer.add_scalar("train/pama/coefficient/a", 1.0, step)
        writer.add_scalar("eval/eval_pama_best", 0.0, steps[-1])
    for number, file in enumerate((folder / name).iterdir()):
        place = len(list(folder.iterdir()))
        os.utime(file, (10 * place + number, 10 * place + number))


def test_a_resumed_run_is_reported_from_its_first_step(tmp_path, capsys) -> None:
    """OpenRLHF names the folders of logs by the minute in which they start."""
    log(tmp_path, "1", range(1, 5))
    log(tmp_path, "2", range(5, 9))
    run = read_run(tmp_path)
    expected = [(step, pytest.approx(step / 10)) for step in range(1, 9)]
    assert run.scalars["reward/a"] == expected and run.problems == ()
    main(["report", str(tmp_path)])
    assert "0.100" in (out := capsys.readouterr().out) and "0.700" in out


@pytest.mark.parametrize(
    ("logs", "steps"),
    [
        ([range(1, 7), range(5, 9)], range(1, 9)),  # killed after the checkpoint of step 4
        ([range(1, 5), range(5, 7), range(7, 9)], range(1, 9)),
        ([range(1, 9), range(1, 4)], range(1, 4)),  # another run
        ([range(1, 9), range(1, 5), range(5, 7)], range(1, 7)),
        ([range(1, 5), range(3, 4), range(6, 9)], [6, 7, 8]),  # of other runs
        ([range(1, 30), range(10, 60, 10)], range(10, 60, 10)),  # another run, with --logger.logging_steps 10
        ([range(10, 50, 10), range(50, 80, 10)], range(10, 80, 10)),
    ],
)
def test_which_logs_belong_to_the_newest_run(logs, steps, tmp_path) -> None:
    for number, part in enumerate(logs):
        log(tmp_path, str(number), part)
    assert [step for step, _ in read_run(tmp_path).scalars["reward/a"]] == list(steps)


def test_missing_steps_are_a_problem(tmp_path) -> None:
    log(tmp_path, "1", range(1, 5), stock=True)
    log(tmp_path, "2", range(5, 9))
    assert read_run(tmp_path).problems == ("4 of the steps 1 to 8 are missing",)


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no TensorBoard events .*--logger.tensorboard_dir"):
        find_runs([tmp_path])
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/reward", 1.0, 1)
    with pytest.raises(ConfigError, match="not the log of a run with --loss.* pama/coefficient/"):
        read_scalars(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="result.json: the file: Invalid JSON"):
        find_runs([tmp_path])


BAD_RESULTS = {
    "nothing": b"",
    "half": b'{"arm": "x", "rule": "x", "sca',
    "a list": b"[]",
    "an arm that is no text": b'{"arm": {}, "rule": "x", "seed": 1, "scalars": {}}',
    "a seed that is none": b'{"arm": "x", "rule": "x", "seed": "many", "scalars": {}}',
    "a series without steps": b'{"arm": "x", "rule": "x", "seed": 1, "scalars": {"reward/length": []}}',
    "steps without values": b'{"arm": "x", "rule": "x", "seed": 1, "scalars": {"reward/length": [[1]]}}',
    "values that are text": b'{"arm": "x", "rule": "x", "seed": 1, "scalars": {"reward/length": [[1, "high"]]}}',
    "not text": bytes(range(128, 256)),
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_does_not_hide_the_others(content, sweep) -> None:
    (sweep / "a-1" / "result.json").write_bytes(content)
    runs, missing = find_runs([sweep])
    assert len(runs) == 5 and len(missing) == 1 and re.search("a-1/result.json: .*found", missing[0])


def test_a_bad_event_file_does_not_hide_the_other_runs(sweep) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def record(data: bytes) -> bytes:
        head = struct.pack("<Q", len(data))
        return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))

    unfinished = sweep / "c"
    unfinished.mkdir()
    (unfinished / "run.json").write_text('{"arm": "c", "rule": "c", "seed": 1}')
    (unfinished / "events.out.tfevents.1").write_bytes(record(b"\xff\xff\xff\xff\x07 no event"))
    runs, missing = find_runs([sweep])
    assert len(runs) == 6 and len(missing) == 1 and "cannot read the TensorBoard events" in missing[0]


def test_names_are_text_not_markup(tmp_path, capsys) -> None:
    names = ["pama[soft=4]", "pama[soft=8]", "[/soft]", r"$\frac$", "_hidden", ":fire:", "<b>bold", "red\x1b[31m"]
    for name in names:
        folder = write_result(tmp_path, f"{names.index(name)}", "", 1, (2.0, 2.0))
        spec = json.loads((folder / "result.json").read_text()) | {"arm": name, "rule": name}
        (folder / "result.json").write_text(json.dumps(spec))
    report_runs([tmp_path], tmp_path / "out")
    printed = capsys.readouterr().out
    shown = [*names[:-1], r"red\x1b[31m"]
    assert all(name in printed for name in shown) and "\x1b" not in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(html.escape(name) in page for name in shown)
    for figure in (draw_curves(find_runs([tmp_path])[0]), draw_front(find_runs([tmp_path])[0], NAMES, (0, 0))):
        labels = [text.get_text().lstrip() for text in figure.legends[0].get_texts()]
        assert [label for label in labels if label not in ("start", "reference")] == shown


@pytest.mark.parametrize("reference", [["length=0"], ["length=0", "sentiment=x"], ["length=0", "sentiment=1", "c=1"]])
def test_a_bad_reference(reference, sweep) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(sweep), "--reference", *reference])
    assert stopped.value.code == 2


def log_rollouts(folder: Path, *rows: tuple[int, str, str, float]) -> None:
    lines = [
        {"step": step, "sample": index, "prompt": prompt, "response": response, "rewards": {"length": reward}}
        for index, (step, prompt, response, reward) in enumerate(rows)
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_shows_what_the_policy_wrote(folder, capsys) -> None:
    log_rollouts(
        folder / "run",
        (1, "Why?", "an early answer", 1.0),
        (1, "How?", "never asked again", 2.0),
        (18, "Why?", "not the last", 5.0),
        (20, "Why?", "<script>late</script>\nanswer", 3.0),
        (20, "What?", "the worst one", -7.0),
    )
    report_runs([folder / "run"], folder / "out")
    page = (folder / "out" / "report.html").read_text()
    pair = page[page.index("the same prompts early and late") :]
    assert pair.index("Why?") < pair.index("an early answer") < pair.index("&lt;script&gt;late&lt;/script&gt;\nanswer")
    assert "How?" not in page and "<script>" not in page
    best, worst = page.index("length: best of the last fifth"), page.index("length: worst of the last fifth")
    assert "not the last" in page[best:worst] and "the worst one" in page[worst:]


def test_a_log_of_rollouts_that_cannot_be_read_is_missing(folder, capsys) -> None:
    (folder / "run" / "rollouts.jsonl").write_text("{}\n{}\n")
    report_runs([folder / "run"], folder / "out")
    assert "rollouts.jsonl, line 1: Field required" in capsys.readouterr().out.replace("\n", "")


def test_the_alarms_of_a_run_are_at_the_head_of_the_page(tmp_path, capsys) -> None:
    with SummaryWriter(str(tmp_path / "pama-run" / "logs")) as writer:
        for step in range(1, 9):
            for tag, value in (("reward/a", 1.0), ("pama/coefficient/a", 1.0), ("pama/reference_nll", 1.0 * step)):
                writer.add_scalar(f"train/{tag}", value, step)
    report_runs([tmp_path / "pama-run" / "logs"], tmp_path)
    alarm = "pama-run: step 4: the responses may no longer be language"
    page = (tmp_path / "report.html").read_text()
    assert f"alarm: {alarm}" in capsys.readouterr().out and page.index(alarm) < page.index("<table>")


def write_metrics(folder: Path, **series: list[float]) -> Path:
    """One value per step of each metric, with objectives a and b; __ in a key stands for /."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in {"pama/coefficient/a": [0.5], "pama/coefficient/b": [0.5], **series}.items():
            for step, value in enumerate(values * (40 if len(values) == 1 else 1), start=1):
                writer.add_scalar(f"train/{tag.replace('__', '/')}", value, step)
    return folder


@pytest.mark.parametrize(
    ("correlation", "conflict", "step"),
    [
        (20 * [0.0] + 20 * [-0.8], 20 * [0.5] + 20 * [0.9], 22),  # 4 of 5 steps there: -0.64
        (20 * [0.0] + 20 * [-0.8], 20 * [0.6] + 20 * [0.4], None),  # fewer conflicts than by chance
        (37 * [0.0] + 3 * [-0.9], 40 * [0.9], None),  # one average at the end
        (20 * [0.0] + 20 * [-0.4], 20 * [0.5] + 20 * [0.9], None),
        (20 * [0.0] + 10 * [-0.8] + 10 * [0.2], 20 * [0.5] + 20 * [0.9], None),  # left again
        ([-0.8], [0.9], 3),  # from the start, in averages of five
        ([math.nan], [0.9], None),
        (20 * [0.0] + 18 * [-0.8], 20 * [0.5] + 20 * [0.9], None),  # then a reward does not vary any more
    ],
)
def test_when_a_run_arrives_at_the_front(correlation, conflict, step, tmp_path) -> None:
    active = [1 - share for share in conflict]
    for one, other in ("ab", "ba"):  # in the order in which the run named its objectives
        series = {f"pama/group_correlation/{one}/{other}": correlation}
        series |= {"pama/conflict_rate": conflict, "pama/active_fraction": active}
        front = find_front(read_run(write_metrics(tmp_path / one, **series)))
        assert front is not None and front.step == step
        assert str(front).startswith(f"at the front from step {step} on: " if step else "not at the front: ")


def test_the_front_is_that_of_the_two_objectives_that_disagree_most(tmp_path) -> None:
    series = {"pama/coefficient/c": [0.1], "pama/conflict_rate": [0.75], "pama/active_fraction": [0.25]}
    series |= {
        "pama/group_correlation/a/b": [0.3],
        "pama/group_correlation/c/a": [-0.9],
        "pama/group_correlation/c/b": [-0.2],
    }
    front = find_front(read_run(write_metrics(tmp_path, **series)))
    assert front is not None and front.pair == ("a", "c") and front.correlation == pytest.approx((-0.9, -0.9))


def test_no_front_without_its_metrics(folder, tmp_path) -> None:
    assert find_front(read_run(folder)) is None  # no correlation was logged
    with SummaryWriter(str(tmp_path / "one")) as writer:
        writer.add_scalar("train/pama/coefficient/a", 1.0, 1)
    assert find_front(read_run(tmp_path / "one")) is None


def test_the_report_says_when_a_run_arrived(tmp_path, capsys) -> None:
    series = {"reward/a": [0.1 * step for step in range(40)], "reward/b": 40 * [1.0], "pama/kl_response": 40 * [1.0]}
    series["pama/group_correlation/a/b"] = 20 * [0.0] + 20 * [-0.8]
    series |= {"pama/conflict_rate": 20 * [0.5] + 20 * [0.9], "pama/active_fraction": 20 * [0.5] + 20 * [0.1]}
    report_runs([write_metrics(tmp_path / "mine" / "logs", **series)], tmp_path / "out")
    line = (
        "mine: at the front from step 22 on: in moving averages until step 40, the rewards a and b correlate by -0.80"
    )
    page, printed = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert f"front: {line}" in printed and page.index(line) < page.index("<table>")
    assert "front.png" not in printed and "1 of 1: 22" in page  # one arm has no front of its own


def test_the_path_of_a_run_shows_where_it_arrived(tmp_path) -> None:
    series = {"reward/a": [0.1 * step for step in range(40)], "reward/b": 40 * [1.0]}
    series["pama/group_correlation/a/b"] = 20 * [0.0] + 20 * [-0.8]
    series |= {"pama/conflict_rate": 20 * [0.5] + 20 * [0.9], "pama/active_fraction": 40 * [0.5]}
    panel = draw_paths([read_run(write_metrics(tmp_path / "run", **series))], ["a", "b"]).axes[0]
    (arrival,) = panel.texts
    assert arrival.get_text() == "at the front, step 22" and arrival.xy == pytest.approx((2.1, 1.0))
    (path, start, ring) = panel.lines
    assert path.get_xydata()[0] == pytest.approx((0, 1)) and start.get_xydata() == pytest.approx(np.array([[0, 1]]))
    assert ring.get_xydata() == pytest.approx(np.array([[2.1, 1.0]]))


def test_the_paths_of_a_sweep_have_its_front(sweep) -> None:
    panel = draw_paths(find_runs([sweep])[0], list(NAMES)).axes[0]
    (front,) = [line for line in panel.lines if line.get_label() == "front of the final rewards"]
    assert front.get_xydata() == pytest.approx(np.array([[1.0, 3.0], [2.0, 2.0]]))  # b 1:3 and a; a dominates b 3:1


def test_runs_of_an_arm_without_a_step_in_common_have_no_path(tmp_path) -> None:
    for seed, first in ((1, 1), (2, 2)):
        folder = write_result(tmp_path, "a", "", seed, (2.0, 2.0))
        result = json.loads((folder / "result.json").read_text())
        for name in NAMES:
            result["scalars"][f"reward/{name}"] = [[step, 1.0] for step in range(first, 11, 2)]
        (folder / "result.json").write_text(json.dumps(result))
    assert draw_paths(find_runs([tmp_path])[0], list(NAMES)) is None


def test_the_paths_of_three_objectives_and_their_distances(tmp_path) -> None:
    series = {"pama/coefficient/c": [0.1], "pama/kl_response": [0.1 * step for step in range(40)]}
    series |= {f"reward/{name}": [0.1 * step for step in range(40)] for name in "abc"}
    figure = draw_paths([read_run(write_metrics(tmp_path / "run", **series))], ["a", "b", "c"])
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == [
        "run", "a against distance", "b against distance", "c against distance"
    ]  # fmt: skip


def test_tables_are_not_folded_in_a_log(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "a-run-whose-name-takes-more-than-a-quarter-of-eighty-columns"
    report_runs([write_metrics(tmp_path / name, **{"reward/a": 40 * [1.0], "reward/b": 40 * [1.0]})], tmp_path)
    assert f"│{name} │a         │      1.000 │" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "osine" not in page, "no run has a value, so nothing is to be explained"
    assert "width=device-width" in page and page.count('<td class="text">a<td>') == 1


def test_the_start_is_the_first_step_and_not_the_first_step_to_which_an_objective_applied() -> None:
    series = [
        {"reward/a": [(1, 1.0), (2, 9.0)], "reward/b": [(3, 7.0)]},
        {"reward/a": [(1, 3.0), (2, 9.0)], "reward/b": [(1, 5.0)]},
    ]
    runs = [SimpleNamespace(scalars=scalars) for scalars in series]
    assert starts(runs, ["a", "b"]).tolist() == [2, 5]
    assert starts(runs[:1], ["a", "b"]).tolist() == [1, 7], "there is nothing earlier"
