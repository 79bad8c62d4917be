"""Processing of the rewards of a rollout batch: pure functions of tensors, independent of OpenRLHF."""
