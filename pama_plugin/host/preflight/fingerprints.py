"""The drift guard: compares OpenRLHF with fingerprints of every seam in the supported releases.

A seam is a function or class of OpenRLHF that the plugin subclasses, replaces, calls or looks up. Its fingerprint is
its signature and a hash of its body, read from the source: OpenRLHF is not imported, and comments, docstrings, layout
and argument annotations do not count. ``fingerprints.json`` has the fingerprints of every supported release, as
published and (``+cpu``) with our patch.

For a new release, or a new line in ``SEAMS``, regenerate the table from the wheels of *all* releases in it:

    python patches/build_wheel.py .venv/hosts RELEASE             (once per release; the tests leave them there too)
    python -m pama_plugin.host.preflight.fingerprints .venv/hosts/*.whl

then review the table's diff, and OpenRLHF's diff where a fingerprint changed. ``pyproject.toml`` and
``patches/build_wheel.py`` list the releases too.
"""

import ast
import hashlib
import json
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

from pama_plugin.errors import ConfigError

TABLE = Path(__file__).with_name("fingerprints.json")

# File of OpenRLHF → functions, classes (header and fields) and, as __main__, the code that runs as the command.
SEAMS = {
    "cli/train_ppo_ray.py": "train __main__",
    "datasets/prompts_dataset.py": """
        preprocess_data PromptDataset PromptDataset.__init__ PromptDataset.__getitem__ PromptDataset.collate_fn""",
    "datasets/utils.py": "blending_datasets",
    "models/actor.py": "Actor.forward",
    "models/loss.py": "PolicyLoss.forward ValueLoss.__init__ ValueLoss.forward",
    "models/model.py": "get_llm_for_sequence_regression _get_reward_model _get_critic_model",
    "models/utils.py": "compute_reward masked_mean",
    "trainer/ppo_trainer.py": """
        prepare_datasets compute_eval_metrics
        BasePPOTrainer.__init__ BasePPOTrainer.restore_best_checkpoint_state BasePPOTrainer.train_step
        BasePPOTrainer.ppo_train BasePPOTrainer.broadcast_to_vllm BasePPOTrainer.save_best_checkpoint
        BasePPOTrainer.save_logs_and_checkpoints BasePPOTrainer.init_checkpoint_states
        BasePPOTrainer._compute_rollout_stats
        PPOTrainer PPOTrainer.__init__ PPOTrainer.fit PPOTrainer.evaluate""",
    "trainer/ppo_trainer_async.py": """
        GenerateSamplesActor GenerateSamplesActor.__init__ GenerateSamplesActor.load_state_dict
        GenerateSamplesActor._run_eval GenerateSamplesActor.fit
        TrainingActor TrainingActor.__init__ TrainingActor.fit
        PPOTrainerAsync PPOTrainerAsync.__init__ PPOTrainerAsync.fit""",
    "trainer/ppo_utils/experience.py": """
        Experience Experience.concat_experiences split_experience_batch make_experience_batch
        remove_padding_in_sequences balance_experiences""",
    "trainer/ppo_utils/experience_maker.py": """
        RemoteExperienceMaker.__init__ RemoteExperienceMaker.split_rollout_samples
        RemoteExperienceMaker.make_experience_batch RemoteExperienceMaker._dispatch_forward
        RemoteExperienceMaker._flatten_results RemoteExperienceMaker.make_experience
        RemoteExperienceMaker.compute_advantages_and_returns RemoteExperienceMaker.get_advantages_and_returns
        RemoteExperienceMaker.get_cumulative_returns""",
    "trainer/ppo_utils/length_penalty.py": "apply_length_penalties",
    "trainer/ppo_utils/replay_buffer.py": """
        NaiveReplayBuffer.__init__ NaiveReplayBuffer.append NaiveReplayBuffer.collate_fn
        NaiveReplayBuffer.setup_dynamic_batch""",
    "trainer/ppo_utils/samples_generator.py": """
        SamplesGenerator.__init__ SamplesGenerator.generate_samples SamplesGenerator.generate_eval_samples
        SamplesGenerator._generate_vllm SamplesGenerator._process_response_into_experience""",
    "trainer/ray/launcher.py": """
        BaseModelActor.execute_batch ReferenceModelActor.forward
        RewardModelActor RewardModelActor.init_model_from_pretrained RewardModelActor.forward
        RayActorGroup.__init__ RayActorGroup.async_init_model_from_pretrained RayActorGroup.async_run_method
        RayActorGroup.async_run_method_batch""",
    "trainer/ray/ppo_actor.py": """
        ActorPPOTrainer.broadcast_to_vllm PolicyModelActor.broadcast_to_vllm
        PolicyModelActor.init_model_from_pretrained PolicyModelActor.forward PolicyModelActor.append
        PolicyModelActor.save_checkpoint""",
    "trainer/ray/ppo_critic.py": """
        CriticPPOTrainer CriticPPOTrainer.__init__ CriticPPOTrainer.ppo_train CriticPPOTrainer.training_step
        CriticModelActor CriticModelActor.init_model_from_pretrained CriticModelActor.forward CriticModelActor.append
        CriticModelActor.fit CriticModelActor.save_model CriticModelActor.save_checkpoint""",
    "trainer/ray/vllm_engine.py": """
        _load_agent_executor create_vllm_engines batch_vllm_engine_call
        RolloutRayActor RolloutRayActor.__init__ RolloutRayActor.generate_responses""",
    "trainer/ray/utils.py": "ray_noset_visible_devices",
    "utils/agent.py": """
        AgentExecutorBase.execute MultiTurnAgentExecutor.__init__ MultiTurnAgentExecutor.execute
        SingleTurnAgentExecutor.__init__ SingleTurnAgentExecutor.execute""",
    "utils/config.py": "hierarchize",
    "utils/deepspeed/deepspeed.py": """
        DeepspeedStrategy.prepare DeepspeedStrategy.save_model DeepspeedStrategy.save_ckpt
        DeepspeedStrategy.load_ckpt""",
    "utils/logging_utils.py": "init_logger",
    "utils/utils.py": "get_strategy get_tokenizer zero_pad_sequences",
}


class Fingerprint(NamedTuple):
    """A hash of the body, and the signature as one line of Python without annotations."""

    body: str
    signature: str


def fingerprint(package: Path | zipfile.Path) -> dict[str, Fingerprint]:
    """Seam, as ``FILE:NAME``, → fingerprint, for the seams that the OpenRLHF in ``package`` has."""
    fingerprints = {}
    for file, names in SEAMS.items():
        path = package / file
        tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
        for name in names.split():
            if node := _find(tree, name):
                fingerprints[f"{file}:{name}"] = Fingerprint(_hash_body(node), _signature(node))
    return fingerprints


def known_releases() -> dict[str, dict[str, Fingerprint]]:
    """Release → seam → fingerprint, oldest release first; the file has seam → fingerprint → releases."""
    table: dict[str, dict[str, Fingerprint]] = {}
    for seam, variants in json.loads(TABLE.read_text()).items():
        for line, releases in variants.items():
            for release in releases.split():
                table.setdefault(release, {})[seam] = Fingerprint(*line.split(" ", 1))
    return {release: table[release] for release in sorted(table, key=Version)}


def check_host(allow_unsupported: bool) -> list[str]:
    """Compare the installed OpenRLHF with the record of its release, or of the nearest earlier one.

    Returns:
        The warnings; none if every seam is as released.

    Raises:
        ConfigError: the release is not supported or a signature changed, and ``allow_unsupported`` is not set.
    """
    releases = known_releases()
    supported = [release for release in releases if "+" not in release]
    installed, package = host_release(), host_package()
    problems = []
    # A local version (0.11.2+mine) that is not in the table is a custom build of that release.
    release = installed if installed in releases else installed.partition("+")[0]
    if release not in releases:
        problems.append(f"OpenRLHF must be one of {', '.join(supported)}, found {installed}")
        older = [known for known in supported if Version(known) < Version(release)]
        release = (older or supported[:1])[-1]

    fingerprints = fingerprint(package)
    changed = []
    for seam, recorded in releases[release].items():
        signature = fingerprints[seam].signature if seam in fingerprints else "nothing"
        if signature != recorded.signature:
            problems.append(f"{seam} of OpenRLHF {installed} must be {recorded.signature!r}, found {signature!r}")
        elif fingerprints[seam].body != recorded.body:
            changed.append(seam)
    if problems and not allow_unsupported:
        raise ConfigError(f"{'; '.join(problems)}; --pama.allow_unsupported_host runs it anyway")
    if changed:
        problems.append(
            f"OpenRLHF {installed} differs from release {release}, with which the plugin was tested, in the body of "
            f"{', '.join(changed)}"
        )
    return problems


def host_package() -> Path:
    """The folder of the OpenRLHF that would be imported. Raises ``ConfigError`` if there is none."""
    spec = find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("OpenRLHF must be installed, or its checkout on PYTHONPATH, found neither")
    return Path(spec.submodule_search_locations[0])


def host_release() -> str:
    """The release of that OpenRLHF: a checkout has a version.txt; other copies are told by their fingerprints."""
    package = host_package()
    beside = package.parent / "version.txt"
    if beside.is_file() and (package.parent / "setup.py").is_file():  # a checkout, which is not what is installed
        return beside.read_text().strip()
    with suppress(PackageNotFoundError):
        return version("openrlhf")
    found = fingerprint(package)
    releases = known_releases()
    return max(releases, key=lambda release: sum(found.get(seam) == known for seam, known in releases[release].items()))


def _find(tree: ast.Module, name: str) -> Any:
    """Return the definition of a dotted name, or the block that runs as ``__main__``; None if there is none."""
    if name == "__main__":
        blocks = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        return blocks[-1] if blocks else None
    node: Any = tree
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            return None
        node = named[-1]
    return node


def _signature(node: Any) -> str:
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        fields = ", ".join(ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign))
        return f"class {node.name}({bases})" + (f": {fields}" if fields else "")
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(node.args)})"


def _hash_body(node: Any) -> str:
    """Hash decorators and statements. The methods of a class are not part of it: they are separate seams, if any."""
    methods = (ast.FunctionDef, ast.AsyncFunctionDef) if isinstance(node, ast.ClassDef) else ()
    body = [line for line in node.body if not isinstance(line, methods)]
    text = _canonical([*getattr(node, "decorator_list", []), *body])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(node: Any) -> str:
    """The tree as text, the same in every version of Python; that of ``ast.dump`` is not."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        # A bare constant is a docstring, or has no effect either.
        kept = [item for item in node if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
        return f"[{','.join(map(_canonical, kept))}]"
    return repr(node)


def _read_wheel(wheel: Path) -> tuple[str, dict[str, Fingerprint]]:
    release = wheel.name.split("-")[1]
    return release, fingerprint(zipfile.Path(wheel) / f"openrlhf-{release}.data" / "purelib" / "openrlhf")


def write_table(wheels: list[Path]) -> None:
    """Replace ``fingerprints.json`` with the fingerprints of these wheels."""
    table: dict[str, dict[str, str]] = {}
    for release, seams in sorted(map(_read_wheel, wheels), key=lambda item: Version(item[0])):
        for seam, parts in seams.items():
            variants = table.setdefault(seam, {})
            variants[" ".join(parts)] = f"{variants.get(' '.join(parts), '')} {release}".strip()
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    write_table([Path(wheel) for wheel in sys.argv[1:]])
