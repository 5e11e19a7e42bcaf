"""Features are those of transformers' extractors."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from tokenizer_proc.audio.features import extractor
from tokenizer_proc.audio.split import WINDOW

NOISE = (np.random.default_rng(0).standard_normal(WINDOW) * 0.1).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("count", [1, 399, 16_000, WINDOW - 200, WINDOW])
def test_log_mel_equals_that_of_transformers(tmp_path: Path, mels: int, count: int) -> None:
    reference = WhisperFeatureExtractor(feature_size=mels)
    reference.save_pretrained(tmp_path)
    expected = reference(NOISE[:count], sampling_rate=16_000, return_tensors="np").input_features[0]
    np.testing.assert_allclose(extractor(tmp_path)(NOISE[:count]), expected, atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_raw_samples_equal_those_of_transformers(tmp_path: Path, normalise: bool) -> None:
    reference = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    reference.save_pretrained(tmp_path)
    expected = reference(NOISE[:16_000], sampling_rate=16_000, return_tensors="np").input_values[0]
    np.testing.assert_allclose(extractor(tmp_path)(NOISE[:16_000]), expected, atol=1e-5)


@pytest.mark.parametrize("told", [{}, {"feature_extractor_type": "Other"},
                                  {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 8000}])
def test_a_checkpoint_that_asks_for_something_else_is_refused(tmp_path: Path, told: dict[str, object]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="extractor|16 kHz|encoder"):
        extractor(tmp_path)
