"""The server's log: one JSON object a line on stderr."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from typing import Any

log = logging.getLogger("clipadapt.serve")


class JsonLines(logging.Formatter):
    """Time, level, message, and the fields given as `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Send this server's lines, and the warnings of uvicorn, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("clipadapt.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd images, which clients send as they like
