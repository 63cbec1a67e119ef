"""The composition root: builds the parts of a job from its configuration. Nothing else does."""
