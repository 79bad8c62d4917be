"""``pama soup``: the weights between policies, of whole models, several files and LoRA adapters."""

import json
import re
from pathlib import Path

import pytest
import torch

from pama_plugin.cli import main
from pama_plugin.errors import ConfigError

pytest.importorskip("safetensors")
pytest.importorskip("tensorboard")

from safetensors import safe_open
from safetensors.torch import save_file

from pama_plugin.soup import interpolate


def save(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    homes = {key: f"model-{index % shards}.safetensors" for index, key in enumerate(tensors)}
    for file in set(homes.values()):
        save_file(
            {key: tensors[key] for key in tensors if homes[key] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}, "transformers refuses files without it"
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


def policy(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(3, 4, generator=generator).to(dtype) for key in ("a.weight", "b.weight", "c.weight")}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_is_the_weighted_sum(shards, dtype, tmp_path) -> None:
    one, other = policy(1, dtype), policy(2, dtype)
    folders = [save(tmp_path / "one", one, shards=shards, config='{"x": 1}'), save(tmp_path / "other", other)]
    interpolate(folders, (0.25, 0.75), tmp_path / "soup")
    found = load(tmp_path / "soup")
    for key in one:
        expected = (0.25 * one[key].float() + 0.75 * other[key].float()).to(dtype)
        assert torch.equal(found[key], expected)
    assert (tmp_path / "soup" / "config.json").read_text() == '{"x": 1}'
    interpolate(folders, (1.0, 0.0), tmp_path / "first")
    assert all(torch.equal(tensor, one[key]) for key, tensor in load(tmp_path / "first").items())


def save_adapter(folder: Path, seed: int, rank: int, alpha: int, **settings) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {
        "base_model.model.q.lora_A.weight": torch.randn(rank, 6, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(5, rank, generator=generator),
        "base_model.model.head.weight": torch.randn(2, 5, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapters add to the weights of the base, and the tensor that is no adapter."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load(folder)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    added = scale * tensors["base_model.model.q.lora_B.weight"] @ tensors["base_model.model.q.lora_A.weight"]
    return added, tensors["base_model.model.head.weight"]


def test_of_adapters_the_products_are_interpolated_whatever_their_ranks(tmp_path) -> None:
    folders = [save_adapter(tmp_path / "one", 1, 2, 8), save_adapter(tmp_path / "other", 2, 3, 3, use_rslora=True)]
    interpolate(folders, (0.25, 0.75), tmp_path / "soup")
    for found, one, other in zip(change(tmp_path / "soup"), *map(change, folders)):
        torch.testing.assert_close(found, 0.25 * one + 0.75 * other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_dora=True), "use_dora=False, found True"),
        (dict(rank_pattern={"q": 1}), "rank_pattern={}, found"),
        (dict(base_model_name_or_path="else"), "the same base_model_name_or_path, found base and else"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(settings, message, tmp_path) -> None:
    folders = [save_adapter(tmp_path / "one", 1, 2, 8), save_adapter(tmp_path / "other", 2, 2, 8, **settings)]
    with pytest.raises(ConfigError, match=message):
        interpolate(folders, (0.5, 0.5), tmp_path / "soup")
    assert not (tmp_path / "soup").exists(), "nothing is left that looks like a policy"


def test_policies_that_do_not_fit_are_refused(tmp_path) -> None:
    one = save(tmp_path / "one", policy(1))
    wide = save(tmp_path / "wide", {key: tensor.repeat(2, 1) for key, tensor in policy(1).items()})
    fewer = save(tmp_path / "fewer", dict(list(policy(1).items())[:2]))
    half = save(tmp_path / "half", policy(1, torch.bfloat16))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no")
    adapter = save_adapter(tmp_path / "adapter", 1, 2, 8)
    for other, message in (
        (wide, r"a.weight must be the same kind .*\(3, 4\) of torch.float32 in .*one and \(6, 4\)"),
        (half, r"a.weight must be the same kind .*torch.float32 in .*one and .*torch.bfloat16"),
        (fewer, "the same tensors, found c.weight in only one of"),
        (tmp_path / "empty", "empty has no model.safetensors .*: pama soup reads policies in safetensors"),
        (tmp_path / "broken", "cannot read the policy in .*broken"),
        (adapter, "all policies must be adapters, or none"),
    ):
        with pytest.raises(ConfigError, match=message):
            interpolate([one, other], (0.5, 0.5), tmp_path / "soup")
        assert not list(tmp_path.glob("soup*"))


def test_integers_are_kept_if_all_have_the_same(tmp_path) -> None:
    """A sum of 0.9 and 0.1 times an integer may be a little below it, and would be cut off."""
    ids = torch.arange(512)
    folders = [save(tmp_path / name, policy(seed) | {"ids": ids}) for seed, name in enumerate(("one", "other"))]
    interpolate(folders, (0.9, 0.1), tmp_path / "soup")
    assert torch.equal(load(tmp_path / "soup")["ids"], ids)
    other = save(tmp_path / "third", policy(1) | {"ids": ids + 1})
    with pytest.raises(ConfigError, match="ids has torch.int64, which cannot be interpolated, and differs in .*third"):
        interpolate([folders[0], other], (0.9, 0.1), tmp_path / "another")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["soup", *arguments])
    return ended.value.code


def test_the_command_makes_a_folder_per_weight_vector_and_none_twice(tmp_path, capsys) -> None:
    folders = [str(save(tmp_path / name, policy(seed))) for seed, name in enumerate(("one", "other"))]
    out = tmp_path / "soups"
    assert run(*folders, "--out", str(out), "--points", "3") == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.5_0.5", "0_1", "1_0"]
    before = (out / "1_0" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(*folders, "--out", str(out), "--points", "2") == 0
    assert (out / "1_0" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert run(*folders, "--out", str(out), "--weights", "1.5,-0.5", "0.12345,0.87655") == 0
    assert run(*folders, "--out", str(out), "--weights=-0.5,1.5") == 0
    assert {"1.5_-0.5", "-0.5_1.5", "0.12345_0.87655"} <= {path.name for path in out.iterdir()}
    assert run(*folders[::-1], "--out", str(out), "--points", "2") == 2
    assert "made of other policies or flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "at least two policies are needed, found 1"),
        (["one", "other", "--weights", "0.5"], "--weights must be 2 numbers that sum to 1, .*found '0.5'"),
        (["one", "other", "--weights", "0.5,0.6"], "found '0.5,0.6'"),
        (["one", "other", "--weights", "a,b"], "found 'a,b'"),
        (["one", "other", "--points", "1"], "--points must be at least 2, found 1"),
        (["one", "other", "--points", "5000"], "--points: 5000 points"),
        (["one", "none"], "a policy must be a folder, .*found .*none"),
        (["one", "other", "--", "--ckpt.load_enable"], "without .*--ckpt.load_enable, .*found --ckpt.load_enable"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys) -> None:
    for name in ("one", "other"):
        save(tmp_path / name, policy(1))
    places = [str(tmp_path / word) if word in ("one", "other", "none") else word for word in arguments]
    at = places.index("--") if "--" in places else len(places)
    assert run(*places[:at], "--out", str(tmp_path / "out"), *places[at:]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_each_soup_is_evaluated_with_the_flags_of_a_run(tmp_path, monkeypatch, capsys) -> None:
    """With a command in the place of ``pama train``, which logs as a run with --pama.evaluate_only does."""
    import subprocess

    from torch.utils.tensorboard import SummaryWriter

    folders = [str(save(tmp_path / name, policy(seed))) for seed, name in enumerate(("one", "other"))]
    commands = []

    def evaluate(command, **_):
        commands.append(command)
        model, logs = (Path(command[command.index(flag) + 1]) for flag in MODEL_AND_LOGS)
        if model.parent.name == "0_1" and len(commands) < 4:
            return subprocess.CompletedProcess(command, 1)
        weight = float(model.parent.name.split("_")[0])
        writer = SummaryWriter(str(logs / "run"))
        for key, value in {"a": weight, "a_se": 0.1, "b": 1 - weight, "b_se": 0.2}.items():
            writer.add_scalar(f"eval/eval_all/{key}", value, 0)
        writer.close()
        (logs / "run" / "pama.yaml").write_text("loss: linear\nobjectives: {a: 'builtin:length', b: 'builtin:length'}")
        return subprocess.CompletedProcess(command, 0)

    MODEL_AND_LOGS = ("--actor.model_name_or_path", "--logger.tensorboard_dir")
    monkeypatch.setattr(subprocess, "run", evaluate)
    out = tmp_path / "soups"
    flags = ["--out", str(out), "--points", "3", "--", "--loss", "linear", "--eval.dataset", "held_out.jsonl"]
    assert run(*folders, *flags) == 1 and len(commands) == 3
    assert "failed: " in capsys.readouterr().out
    assert commands[0][1:6] == ["train", "--loss", "linear", "--eval.dataset", "held_out.jsonl"]
    assert "--pama.evaluate_only" in commands[0]
    assert run(*folders, *flags) == 0 and len(commands) == 4, "only what failed is evaluated again"
    lines = [re.findall(r"[^\s│┃]+", line) for line in capsys.readouterr().out.splitlines()]
    assert ["weights", "a", "b"] in lines and "0.5, 0.5 0.5 ± 0.1 0.5 ± 0.2".split() in lines
    soups = json.loads((out / "soups.json").read_text())["soups"]
    assert soups[0] == {
        "weights": [1, 0],
        "rewards": {"a": {"mean": 1, "se": pytest.approx(0.1)}, "b": pytest.approx({"mean": 0, "se": 0.2})},
    }


def test_no_name_is_cut_in_a_log_of_80_columns(tmp_path, monkeypatch, capsys) -> None:
    from pama_plugin import soup

    names = [f"objective_number_{number}" for number in range(6)]
    monkeypatch.setattr(soup, "_read_means", lambda folder: dict.fromkeys(names, (-12.345, 0.01)))
    monkeypatch.setenv("COLUMNS", "80")
    soup.write_table(tmp_path, [tmp_path, tmp_path], [(1, 0), (0, 1)])
    output = capsys.readouterr().out
    assert "-12.35" in output and "…" not in output
