"""The files of an adapter's folder by name: only these are replaced or removed with it."""

from __future__ import annotations

import re

__all__ = ["ADAPTER_FILE", "PARTIAL"]

PARTIAL = r"\.tmp\w{6}"
"""safetensors writes beside its file, and a kill leaves that."""
ADAPTER_FILE = re.compile(
    r"adapter_model\.safetensors|adapter_config\.json|base_facts\.json|README\.md|checksums\.json|tokenizer(_config)?\.json"
    r"|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja"
    rf"|additional_chat_templates/[^/]+\.jinja|{PARTIAL}"
)
"""Paths from the folder on: the adapter, its card, and the files of a tokenizer."""
