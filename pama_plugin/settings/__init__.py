"""Settings of a run: objectives and their options, the rule, the flags. Parsed and validated before Ray starts."""
