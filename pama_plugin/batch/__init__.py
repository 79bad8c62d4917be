"""What becomes of one rollout batch's rewards: pure functions of tensors that know no host."""
