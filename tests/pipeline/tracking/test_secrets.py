"""No secret in any byte that is written or said; names that MLflow takes."""

import json
import os
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.tracking import (
    mlflow_door,
    open_records,
    redact,
    redact_text,
    say,
)
from pipeline.tracking.names import allowed_name, params_of
from tests.pipeline.tracking.builders import (
    CANARY,
    everything_below,
    mlflow_client,
    run_id,
    tracked,
)


def test_no_byte_written_holds_a_secret(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    secrets = {
        "api_key": CANARY, "hubToken": CANARY, "nested": {"deep": [{"Password": CANARY}]},
        "secret_number": 5, "url": f"s3://user:{CANARY}@host/path", "auth": {"user": CANARY},
        "link": f"https://host/a?x=1&X-Amz-Signature={CANARY}&y=2", "note": f"hf_{CANARY}",
    }  # fmt: skip
    paths, config = tracked(
        runs, "secrets", engine={"deepspeed": secrets}, data={"dataset": f"https://me:{CANARY}@host/d"}
    )
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
    assert f"hf_{CANARY}" in config.model_dump_json()
    params = mlflow_client(runs).get_run(run_id(paths)).data.params
    assert params["engine.deepspeed.api_key"] == "[redacted]"
    assert params["engine.deepspeed.secret_number"] == "[redacted]"
    assert params["engine.deepspeed.link"] == "https://host/a?x=1&X-Amz-Signature=[redacted]&y=2"
    assert params["data.dataset"] == "https://[redacted]@host/d"
    assert CANARY not in everything_below(runs)
    assert CANARY not in "".join(capsys.readouterr())


def test_a_tracking_uri_with_a_password_is_used_but_not_kept(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def server(tracking_uri: str) -> MlflowClient:
        seen.append(tracking_uri)
        return mlflow_client(runs)

    monkeypatch.setattr(mlflow_door, "MlflowClient", server)
    uri = f"https://me:{CANARY}@host/mlflow"
    paths, config = tracked(runs, "password", tracking={"mlflow": uri})
    for attempt in ("a1", "a2"):
        with open_records(paths, config, kind="train", attempt=attempt) as records:
            records.log(1, {"loss": 1.0})
    assert seen == [uri, uri]
    kept = json.loads(paths.mlflow_run.read_text())["train"]
    assert kept["tracking"] == "https://[redacted]@host/mlflow"
    assert mlflow_client(runs).get_run(kept["run_id"]).data.params["tracking.mlflow"] == kept["tracking"]
    assert CANARY not in everything_below(runs)


def test_settings_that_only_sound_secret_stay() -> None:
    plain = {"max_tokens": 77, "text": "tokens", "key": 3, "token": None}
    assert redact(plain) == plain


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://u:p/w@host/db", "postgresql://[redacted]@host/db"),
        # A slash inside a password is malformed and still hidden; that costs the path of the rare URL below.
        ("https://host:8080/a@2x.png", "https://[redacted]@2x.png"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        ("mail me@host", "mail me@host"),
        ("AKIAABCDEFGHIJKLMNOP", "[redacted]"),
    ],
)
def test_redacted_text(text: str, left: str) -> None:
    assert redact_text(text) == left


def test_what_is_said_is_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"no answer from\nhttp://me:{CANARY}@host")
    assert capsys.readouterr().err == "tracking: no answer from http://[redacted]@host\n"


def test_names_that_mlflow_takes() -> None:
    assert allowed_name("loss/t=0;<x>") == "loss/t_0__x_"
    assert allowed_name("../up") == "__/up"
    assert len(allowed_name("a" * 1000)) == 250
    assert params_of({"a": {"b": {}}, "c": None, "d": True}) == {"a.b": "{}", "c": "null", "d": "true"}


def test_the_senders_settings_are_small() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 2
