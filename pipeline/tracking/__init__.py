"""What is recorded of a run: files in its folder first, which are the truth, MLflow behind them.

Whatever happens to a tracking server, training neither waits nor dies, and what it missed is sent when it answers
again, at the next start, or by `ldm sync`.
"""

from pipeline.tracking.delivery import open_records, sync_records, tracking_uri
from pipeline.tracking.goodput import goodput
from pipeline.tracking.journal import NoRecords, Records, parse_record, read_records
from pipeline.tracking.redaction import config_for_later, redact, redact_text, redacted_config, say
from pipeline.tracking.starts import commit_of, versions

__all__ = [
    "NoRecords",
    "Records",
    "commit_of",
    "config_for_later",
    "goodput",
    "open_records",
    "parse_record",
    "read_records",
    "redact",
    "redact_text",
    "redacted_config",
    "say",
    "sync_records",
    "tracking_uri",
    "versions",
]
