"""Configurations of other stacks, key by key: TRL, axolotl, LLaMA-Factory."""
