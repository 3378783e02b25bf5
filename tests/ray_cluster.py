"""What tests on Ray share: one token for all of them, since Ray reads it once a process."""

from __future__ import annotations

import secrets

TOKEN = secrets.token_hex(32)  # given, so that Ray writes none into the home folder
