"""Checks the columns of the data sets that objectives need, before Ray starts."""

import argparse
from types import SimpleNamespace
from typing import Any

from pama_plugin.errors import ConfigError
from pama_plugin.host.preflight.preferences import check_preferences
from pama_plugin.settings.condition import column_of, text_of
from pama_plugin.settings.names import DATASOURCE
from pama_plugin.settings.run import PamaConfig


def check_columns(args: argparse.Namespace, config: PamaConfig) -> list[str]:
    """Refuse columns that a data set does not have, conditions that hold for no prompt, and preferences without place.

    Args:
        args: OpenRLHF's flags, flat.
        config: its objectives name the columns.

    Returns:
        A warning if the data sets cannot be read here.

    Raises:
        ConfigError: names the objective, and what there is.
    """
    needs_nothing = not config.columns and config.preferences is None
    if needs_nothing or not getattr(args, "data.prompt_dataset"):
        return []
    if args.use_ms:
        needed = [*config.columns, *(["preferences"] if config.preferences is not None else [])]
        return [f"--use_ms: not checked whether the data sets have what is needed for {', '.join(needed)}"]
    flags = {"data.prompt_dataset": "data.prompt_split", "eval.dataset": "eval.split"}
    read = {
        flag: [_read(args, name, getattr(args, split)) for name in getattr(args, flag).split(",")]
        for flag, split in flags.items()
        if getattr(args, flag)
    }
    for objective in config.objectives:
        for column in objective.columns:
            for flag, data_sets in read.items():
                for rows in data_sets:
                    if column not in (*rows.column_names, DATASOURCE):
                        raise ConfigError(
                            f"objective {objective.name!r}: --{flag} must have the column {column}, found "
                            f"{', '.join(rows.column_names)}"
                        )
        if objective.when is not None:
            name = objective.when.column
            columns = [rows[name] if name in rows.column_names else [None] for rows in read["data.prompt_dataset"]]
            found = {text_of(column_of({name: value}, name)) for column in columns for value in column}
            objective.when.check(found, objective.name)
    return check_preferences(args, config, read) if config.preferences is not None else []


def _read(args: argparse.Namespace, name: str, split: str) -> Any:
    """The rows of one data set, as OpenRLHF reads them."""
    from openrlhf.datasets.utils import blending_datasets  # late: imports the package datasets

    quiet = SimpleNamespace(args=args, print=lambda *_: None, is_rank_0=lambda: False)
    try:
        return blending_datasets(name, None, quiet, max_count=getattr(args, "data.max_samples"), dataset_split=split)
    except Exception as error:  # of the package datasets, which raises many types
        raise ConfigError(f"cannot read the data set {name}: {error}") from error
