"""The words that flags and files share. Nothing is imported for them, so that ``--help`` answers at once."""

STOCK = "ppo"  # --loss of a run without the plugin
BEST_RULES = ("min", "weighted", "hypervolume")
PROBE_MODES = ("off", "warn", "strict")
# Options of an objective of any kind: the fields of ``Objective`` but for its name, kind and location.
COMMON_OPTIONS = (
    *("weight", "role", "threshold", "normalize", "freeze_after", "clip", "range", "on_failure", "max_failures"),
    "probe",
)
