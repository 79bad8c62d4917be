"""``pama score``: the rewards of a run, for the lines of a file."""

import contextlib
import json
import re
import resource
from pathlib import Path

import pytest

from pama_plugin.cli import main
from pama_plugin.rewards import builtin

ROWS = [
    {"prompt": "Hi", "response": "Please wait.", "label": "a", "id": 7},
    {"prompt": [{"role": "user", "content": "Hello"}], "response": '{"ok": true}'},
    {"prompt": "Once", "response": "no"},
]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "rewards.py").write_text(
        "def polite(queries, prompts, labels):\n"
        "    if 'no' in queries[0].split() or queries[0].endswith('no'):\n        raise ValueError('impolite')\n"
        "    return [float('lease' in queries[0]) + 10 * (labels[0] == 'a')]\n"
    )
    return path


def run(file: Path, *flags: str) -> tuple[int, list[dict]]:
    with pytest.raises(SystemExit) as exit:
        main(["score", str(file), *flags])
    out = file.with_suffix(".scored.jsonl")
    return exit.value.code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_every_line_gets_its_rewards_and_keeps_the_rest(file, capsys) -> None:
    flags = ("--pama.objective", f"polite=py:{file.parent}/rewards.py:polite")
    code, rows = run(file, *flags)
    assert code == 0
    assert [row.pop("rewards") for row in rows] == [{"polite": 11}, {"polite": 0}, {"polite": None}]
    assert rows == ROWS
    output = capsys.readouterr().out
    assert "1 of 3" in output and "polite: 1 × ValueError: impolite" in output and "5.5" in output


def test_no_name_is_cut_in_a_log_of_80_columns(file, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "an_objective_with_a_name_that_says_all_of_it"
    assert run(file, "--pama.objective", f"{name}=builtin:length,unit=words")[0] == 0
    output = capsys.readouterr().out
    assert "0 of 3" in output and "…" not in output


def test_settings_from_a_file_and_the_exit_code_of_an_objective_without_rewards(file, capsys) -> None:
    (file.parent / "run.yaml").write_text(
        "loss: linear\nobjectives: {dead: {kind: http, location: 'http://127.0.0.1:9/get_reward', retries: 0}}"
    )
    code, rows = run(file, "--pama.config", f"{file.parent}/run.yaml", "--out", str(file.with_suffix(".scored.jsonl")))
    assert code == 1 and [row["rewards"] for row in rows] == [{"dead": None}] * 3
    assert "3 of 3" in capsys.readouterr().out


@contextlib.contextmanager
def files_end_at(size: int):
    """As a disk on which there is no more room: no file of this process can become longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_noticed_before_anything_is_scored(file, capsys) -> None:
    (file.parent / "rewards.py").write_text(f"def f(q, p, l):\n    open('{file.parent}/called', 'w')\n    return 1\n")
    with files_end_at(100):
        code, rows = run(file, "--pama.objective", f"a=py:{file.parent}/rewards.py:f")
    assert code == 2 and not rows and not (file.parent / "called").exists()
    assert re.search("--out .*rows.scored.jsonl.partial: File too large", capsys.readouterr().err)
    assert not list(file.parent.glob("*.partial"))


def test_a_disk_that_becomes_full_costs_no_reward(file, monkeypatch, capsys) -> None:
    from pama_plugin import score

    scored = score._score

    def fill_the_disk(*arguments):
        outcomes = scored(*arguments)
        (partial,) = file.parent.glob("*.partial")
        limit.enter_context(files_end_at(partial.stat().st_size))
        return outcomes

    monkeypatch.setattr(score, "_score", fill_the_disk)
    with contextlib.ExitStack() as limit:
        code, rows = run(file, "--pama.objective", "a=builtin:length,unit=words,scale=3e-10")
    assert code == 0 and [row["rewards"]["a"] for row in rows] == [words / 3e-10 for words in (2, 2, 1)]
    assert not list(file.parent.glob("*.partial"))


def test_what_was_scored_before_an_interrupt_is_kept(file, monkeypatch) -> None:
    from pama_plugin import score

    scored = score._score
    monkeypatch.setattr(
        score, "_score", lambda objective, *rest: scored(objective, *rest) if objective.name == "a" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["score", str(file), "--pama.objective", "a=builtin:json", "--pama.objective", "b=builtin:json"])
    (partial,) = file.parent.glob("*.partial")
    rewards = [json.loads(line)["rewards"] for line in partial.read_text().splitlines() if line.strip()]
    assert rewards == [{"a": 0}, {"a": 1}, {"a": 0}]
    assert not file.with_suffix(".scored.jsonl").exists()


def test_registered_rewards_need_a_tokenizer_only_to_count_tokens(file, capsys, monkeypatch) -> None:
    monkeypatch.setitem(builtin.REWARDS.entries, "shouts", lambda: lambda response: response.response.count("!"))
    monkeypatch.setitem(builtin.REWARDS.entries, "counts", lambda: lambda response: response.num_tokens)
    code, rows = run(file, "--pama.objective", "a=builtin:shouts", "--pama.objective", "b=builtin:counts")
    assert code == 1 and [row["rewards"] for row in rows] == [{"a": 0, "b": None}] * 3
    assert re.search("b: 3 × --tokenizer .*found none", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", (), "rows.jsonl .*at least one line.*found none"),
        ("{", (), "rows.jsonl, line 1 .*JSON"),
        ('{"prompt": "a"}', (), "rows.jsonl, line 1 .*prompt .* response .*found .*prompt"),
        (f'{{"prompt": "a", "response": "b"}}\n\n{100_000 * "["}', (), "rows.jsonl, line 3 must be JSON"),
        (
            '{"prompt": [{"role": "user", "content": null}], "response": "b"}',
            (),
            r"rows.jsonl, line 1: .*--tokenizer.*content must be text, found .None",
        ),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "response": "b"}',
            (),
            "rows.jsonl, line 1: .*content must be text, found .*type",
        ),
        ('{"prompt": "a", "response": "b", "rewards": 1}', (), "rows.jsonl, line 1: rewards must map names.*found 1"),
        ('{"prompt": [], "response": "b"}', (), "rows.jsonl, line 1 .*prompt .*found .*response"),
        ('{"prompt": "a", "response": "b"}', ("n=builtin:length",), "--tokenizer .*'n'.*found none"),
        ('{"prompt": "a", "response": "b"}', ("s=agent:style",), "kind agent.*found .*'s'"),
        ('{"prompt": "a", "response": "b"}', ("s=py:no.py:f",), "no such file: .*no.py"),
    ],
)
def test_invalid_files_and_objectives_are_refused(tmp_path, capsys, content, flags, message) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    objectives = flags or ("j=http:http://127.0.0.1:9/r",)
    code, rows = run(file, *(word for objective in objectives for word in ("--pama.objective", objective)))
    assert code == 2 and rows == [] and re.search(message, capsys.readouterr().err)


def test_a_missing_file(tmp_path, capsys) -> None:
    code, _ = run(tmp_path / "nowhere.jsonl", "--pama.objective", "s=http:http://127.0.0.1:9/r")
    assert code == 2 and "cannot read" in capsys.readouterr().err


def test_help_documents_the_arguments(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = capsys.readouterr().out
    assert "JSONL" in text and "--pama.objective NAME=KIND:LOCATION" in text and "--tokenizer MODEL" in text


def test_only_newlines_separate_lines_and_labels_keep_their_type(tmp_path) -> None:
    (tmp_path / "rewards.py").write_text("def f(queries, prompts, labels):\n    return float(labels[0] == 0)\n")
    rows = [{"prompt": "a\u2028b", "response": "c\u0085", "label": 0}, {"prompt": "a", "response": "b", "label": None}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    _, scored = run(file, "--pama.objective", f"zero=py:{tmp_path}/rewards.py:f")
    assert [row["rewards"]["zero"] for row in scored] == [1.0, 0.0]


@pytest.mark.parametrize("out", ["nowhere/rows.jsonl", "rows.jsonl"])
def test_an_invalid_out_is_refused_before_scoring(file, capsys, out) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["score", str(file), "--pama.objective", "n=builtin:json", "--out", str(file.parent / out)])
    assert exit.value.code == 2 and re.search(f"--out .*other than .*found .*{out}", capsys.readouterr().err)
    assert [json.loads(line) for line in file.read_text().splitlines() if line] == ROWS


def test_a_file_of_functions_that_cannot_be_imported_is_named(file, capsys) -> None:
    (file.parent / "broken.py").write_text("import nothing_like_it\ndef f(queries, prompts, labels): ...\n")
    with pytest.raises(SystemExit) as exit:
        main(["score", str(file), "--pama.objective", f"x=py:{file.parent}/broken.py:f"])
    assert exit.value.code == 2
    assert re.search("objective 'x'.* ModuleNotFoundError: .*nothing_like_it", capsys.readouterr().err)


def test_text_is_not_a_number(file, capsys, monkeypatch) -> None:
    monkeypatch.setitem(builtin.REWARDS.entries, "says", lambda: lambda response: "0.5")
    code, _ = run(file, "--pama.objective", "a=builtin:says")
    assert code == 1 and "returned '0.5', which is not a number" in capsys.readouterr().out


def test_a_missing_tokenizer(file, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["score", str(file), "--pama.objective", "n=builtin:length", "--tokenizer", "./nope"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and re.search("--tokenizer: .*./nope: ", error)
    assert "Traceback" not in error


@pytest.mark.timeout(50)
def test_pama_score_does_not_wait_for_a_server_that_is_down(file, capsys, monkeypatch) -> None:
    """A run waits for as long as one attempt, because a failure would end it."""
    import tenacity

    from pama_plugin.rewards import server as client

    monkeypatch.setattr(client, "BACKOFF", tenacity.wait_none())
    monkeypatch.setattr(client, "LONGEST_OUTAGE", 1)
    with file.open("a") as rows:
        rows.writelines(json.dumps(ROWS[0]) + "\n" for _ in range(20))
    code, _ = run(file, "--pama.objective", "dead=http:http://127.0.0.1:9/get_reward,timeout=60")
    assert code == 1 and "all replicas have been suspended for 1 s" in " ".join(capsys.readouterr().out.split())


@pytest.mark.needs_extras
def test_what_a_tokenizer_cannot_read_is_named_by_its_line(tmp_path, capsys) -> None:
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "policy")
    fine = {"prompt": [{"role": "user", "content": "a"}], "response": "b"}
    broken = {
        "System role not supported": {"prompt": [{"role": "system", "content": "a"}], "response": "b"},
        "cannot read": {"prompt": "a", "response": "\ud800"},
    }
    for message, row in broken.items():
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(fine) + "\n" + json.dumps(row) + "\n")
        code, _ = run(file, "--pama.objective", "n=builtin:length", "--tokenizer", str(tmp_path / "policy"))
        assert code == 2 and re.search(f"rows.jsonl, line 2: .*{message}", capsys.readouterr().err)


def test_rewards_of_an_earlier_call_and_a_null_label_are_kept(tmp_path) -> None:
    (tmp_path / "rewards.py").write_text("def f(queries, prompts, labels):\n    return float(labels[0] is None)\n")
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "response": "b", "label": None, "rewards": {"old": 3, "f": 9}}
    file.write_text(json.dumps(row) + "\n")
    _, rows = run(file, "--pama.objective", f"f=py:{tmp_path}/rewards.py:f")
    assert rows == [row | {"rewards": {"old": 3, "f": 1.0}}]


def test_objectives_apply_to_rows_by_their_columns_and_share_a_call(file, capsys) -> None:
    """In the table and the file in the order of the flags, whatever shares a call."""
    (file.parent / "grade.py").write_text(
        "calls = 0\n\n\ndef grade(queries, prompts, labels, level):\n"
        "    global calls\n    calls += 1\n    return {'level': level, 'calls': calls, 'none': None}\n"
    )
    rows = [row | {"level": index, "datasource": "math" if index else "chat"} for index, row in enumerate(ROWS)]
    del rows[0]["datasource"]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    grade = f"py:{file.parent}/grade.py:grade,columns=level,isolate=false"
    objectives = {
        "level": f"{grade},key=level,when=datasource:math",
        "length": "builtin:length,unit=words",
        "calls": f"{grade},key=calls,when=datasource:math",
        "none": f"{grade},key=none,abstain=true",
        "chat": "builtin:length,unit=words,when=datasource:default",
    }
    flags = [word for name, spec in objectives.items() for word in ("--pama.objective", f"{name}={spec}")]
    code, scored = run(file, *flags)
    assert code == 1, "none scored no response"
    assert [row["rewards"] for row in scored] == [
        {"level": None, "length": 2, "calls": None, "none": None, "chat": 2},
        {"level": 1, "length": 2, "calls": scored[1]["rewards"]["calls"], "none": None, "chat": None},
        {"level": 2, "length": 1, "calls": scored[2]["rewards"]["calls"], "none": None, "chat": None},
    ]
    assert {scored[1]["rewards"]["calls"], scored[2]["rewards"]["calls"]} <= {1, 2, 3}, "one call for each response"
    output = capsys.readouterr().out
    assert re.search(r"applies to.*no reward.*level .*2 of 3.*0 of 2.*none .*0 of 3", output, re.DOTALL)
    assert output.index("level ") < output.index("length ") < output.index("calls ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("when=datasource:math", "when=datasource:math must name values .*which has default; no prompt has math"),
        ("when=task:a", "every line of .*rows.jsonl must have 'task', found one with prompt, response"),
    ],
)
def test_a_column_that_a_line_lacks_and_a_value_of_none_are_refused(option, message, file, capsys) -> None:
    code, _ = run(file, "--pama.objective", f"x=builtin:length,unit=words,{option}")
    assert code == 2 and re.search(message, capsys.readouterr().err)
