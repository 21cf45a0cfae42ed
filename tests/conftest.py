"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """A model's `set_attention_backend` makes its choice the process's too, and `reset_attention_backend` leaves it."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = active
