"""Names shared by flags and files. This module imports nothing, to keep ``--help`` fast."""

STOCK = "ppo"  # value of --loss for a run without the plugin
BEST_RULES = ("min", "weighted", "hypervolume")
PROBE_MODES = ("off", "warn", "strict")
DATASOURCE, DEFAULT_DATASOURCE = "datasource", "default"  # OpenRLHF's column, and its value where there is none
# Options of every kind: the fields of ``Objective`` except name, kind, location and options.
COMMON_OPTIONS = (
    "weight",
    "role",
    "threshold",
    "normalize",
    "freeze_after",
    "clip",
    "range",
    "on_failure",
    "max_failures",
    "abstain",
    "when",
    "probe",
)
