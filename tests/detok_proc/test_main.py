"""The detokenizer as a process: it starts from its configuration file alone and says why where it cannot."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.config import ModelConfig, ServerConfig, save
from pipeline.exits import MODEL_LOAD


def test_a_missing_tokenizer_ends_the_stage_with_one_sentence_and_the_load_exit_code(tmp_path: Path) -> None:
    config = ServerConfig(run_dir=str(tmp_path), log_dir=str(tmp_path), models=(
        ModelConfig(names=("m",), path=str(tmp_path / "nothing")),))
    save(config, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, "-m", "detok_proc", "--config", str(tmp_path / "config.json"), "--index", "0", "--epoch", "1"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == MODEL_LOAD
    assert done.stderr.splitlines()[-1] == f"There is no tokenizer.json in {tmp_path / 'nothing'}."
