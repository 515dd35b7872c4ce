"""The script for a GPU machine runs here, on small tensors."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    script = import_module("gpu")
    script.main([str(tmp_path), "--dry"])
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"machine", *script.SECONDS}
    # two packages that are not ours to install
    bad = [row for row in rows if not row.get("note", "not installed").endswith("not installed")]
    assert [row for row in bad if "without margin" not in row["note"]] == []
    errors = {row["what"]: row for row in rows if "loss_error" in row}
    assert all(row["loss_error"] < 1e-4 for row in errors.values())
    exact = {row["dtype"]: row["gradient_error"] for row in rows if row["what"] == "dense"}
    assert exact["float32"] < 2e-5
    assert "| CosFace, fp16 |" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit, match="no GPU is here: --dry"):
        script.main([str(tmp_path / "real")])
