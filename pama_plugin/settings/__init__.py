"""What the user asks for: objectives, their options, the rule and the flags; parsed and checked before Ray starts."""
