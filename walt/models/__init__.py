"""Denoisers: one file per backbone, each a diffusers `ModelMixin`."""
