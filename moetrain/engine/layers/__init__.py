"""One page a part: Megatron's specification and configuration fields of it."""
