"""`moetrain quickstart` from end to end, with a few steps a stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from moetrain.run import quickstart
from moetrain.testing import command


@pytest.mark.slow
@pytest.mark.gloo
def test_every_stage_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forked(words: list[str], env: dict[str, str], check: bool) -> Any:
        assert tuple(words[:3]) == command.MOETRAIN
        return command.run(*words[3:], env=env)

    monkeypatch.setattr("subprocess.run", forked)
    short = ("train.steps=3", "train.eval_packs=2", "observe.tensorboard=false")
    assert quickstart.main(tmp_path, short) == 0
    printed = capsys.readouterr().out
    assert "pretrain" in printed and "sft" in printed and "of 200" in printed
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 200
    for stage in quickstart.STAGES:
        assert (tmp_path / stage / "hf" / "model.safetensors.index.json").is_file()
