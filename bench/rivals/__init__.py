"""The step of other trainers, beside the engine's."""
