"""Makes a model loadable: GGUF file, Hugging Face directory or hub id -> config, safetensors and tokenizer.json.

    python -m engine_proc.prepare --source PATH_OR_GGUF_OR_HUB_ID --out-root CACHE_DIR [--tokenizer DIR]

Run by the launcher as a short-lived process, so that the command line itself never imports torch. Prints one JSON line
per phase, {"phase", "percent"}, and at the end {"path", "tokenizer"}: where the weights and the tokenizer.json are.
An error is one sentence on stderr and exit code 3, never a traceback. Conversions are cached and renamed into place.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engine_proc import checkpoint
from engine_proc.checkpoint import refuse
from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD

Progress = Callable[[str, int], None]
FORMAT = "2"                        # part of the cache key: raise it when a conversion changes
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
HUB_ERRORS = {
    "LocalEntryNotFoundError": "it is not in the local cache and the hub cannot be reached",
    "OfflineModeIsEnabled": "it is not in the local cache and the hub is switched off (HF_HUB_OFFLINE)",
    "RepositoryNotFoundError": "the hub has no such repository, or it needs a token (HF_TOKEN)",
    "GatedRepoError": "the repository needs a token with access (HF_TOKEN)",
    "RevisionNotFoundError": "the repository has no such revision",
    "HFValidationError": "it is no valid repository name",
}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def prepare(source: str, out_root: Path, tokenizer: str | None, trust_remote_code: bool,
            progress: Progress) -> dict[str, str]:
    """{"path": directory of the weights, "tokenizer": directory of tokenizer.json}, or a StartError."""
    path = Path(source).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise refuse(f"The file {path} is not a GGUF file; give a GGUF file or a Hugging Face directory.")
        model = prepare_gguf(path.resolve(), out_root, progress)
    elif path.is_dir():
        checkpoint.check(path)
        model = path.resolve()
    elif HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        model = prepare_hub(source, trust_remote_code, progress)
    else:
        raise refuse(f"There is no model at '{source}'.")
    home = model if tokenizer is None else Path(tokenizer).expanduser()
    if not home.is_dir():
        raise refuse(f"There is no tokenizer directory '{tokenizer}'.")
    return {"path": str(model), "tokenizer": str(prepare_tokenizer(home, out_root, trust_remote_code, progress))}


def is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise refuse(f"The file {path} cannot be read: {error.strerror}.") from None


def identity(path: Path) -> str:
    """A cache key: size, modification time and the hash of the first MiB (which holds a GGUF file's metadata)."""
    status = path.stat()
    with open(path, "rb") as stream:
        head = hashlib.sha256(stream.read(2**20))
    head.update(f"{FORMAT} {status.st_size} {status.st_mtime_ns}".encode())
    return head.hexdigest()[:16]


@contextlib.contextmanager
def cache_entry(out_root: Path, name: str) -> Iterator[tuple[Path, Path | None]]:
    """(final directory, a private directory to fill, or None when it is there already).

    The filled directory is renamed into place when the block ends well, and removed when it does not. When two
    processes prepare the same thing, the first rename wins and both use it.
    """
    final = out_root / name
    if (final / ".complete").exists():
        yield final, None
        return
    try:
        out_root.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out_root))     # 0700
    except OSError as error:
        raise refuse(f"The cache directory {out_root} cannot be written: {error.strerror}.") from None
    try:
        yield final, work
        for file in work.iterdir():
            file.chmod(0o600)
        (work / ".complete").touch(mode=0o600)
        with contextlib.suppress(OSError):      # another process was faster
            os.rename(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not (final / ".complete").exists():
        raise refuse(f"The cache directory {final} is in the way and incomplete; remove it.")


def prepare_gguf(path: Path, out_root: Path, progress: Progress) -> Path:
    """Convert a GGUF file once; later calls find the directory."""
    with cache_entry(out_root, f"{_slug(path.stem)}-{identity(path)}") as (final, work):
        if work is not None:
            from engine_proc import gguf_convert
            try:
                gguf_convert.convert(path, work, progress)
                checkpoint.check(work)
            except StartError:
                raise
            except MemoryError:
                raise refuse(f"There is not enough memory to convert {path}.") from None
            except OSError as error:
                why = error.strerror or "it is not a readable GGUF file"
                raise refuse(f"Converting {path} failed: {why}.") from None
            except Exception as error:   # transformers and gguf raise anything for a file that they cannot read
                raise refuse(f"The GGUF file {path} cannot be converted ({_brief(error)}).") from None
    return final


def prepare_hub(source: str, trust_remote_code: bool, progress: Progress) -> Path:
    """Download (or find in the hub's cache) the safetensors and JSON files of a repository."""
    progress("downloading", 0)
    from huggingface_hub import snapshot_download
    repo, _, revision = source.partition("@")
    patterns = HUB_FILES + (["*.py"] if trust_remote_code else [])
    try:
        model = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:     # the hub client's errors span several libraries
        why = HUB_ERRORS.get(type(error).__name__) or _brief(error)
        raise refuse(f"There is no model directory or file '{source}', and as a hub id: {why}.") from None
    checkpoint.check(model)
    return model


def prepare_tokenizer(home: Path, out_root: Path, trust_remote_code: bool, progress: Progress) -> Path:
    """A directory with tokenizer.json: `home`, or a converted copy for tokenizers of the older kinds."""
    if (home / "tokenizer.json").exists():
        checkpoint.read_json(home / "tokenizer.json")
        return home.resolve()
    sources = [file for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
               if (file := home / name).exists()]
    if not sources:
        raise refuse(f"The directory {home} has no tokenizer.")
    key = hashlib.sha256(" ".join(identity(file) for file in sources).encode()).hexdigest()[:16]
    with cache_entry(out_root, f"tokenizer-{_slug(home.resolve().name)}-{key}") as (final, work):
        if work is not None:
            progress("converting the tokenizer", 50)
            try:
                from transformers import AutoTokenizer
                tokenizer = AutoTokenizer.from_pretrained(home, use_fast=True, trust_remote_code=trust_remote_code)
                tokenizer.save_pretrained(work)
            except Exception as error:   # any of a dozen converters
                raise refuse(f"The tokenizer of {home} cannot be converted ({_brief(error)}).") from None
            if not (work / "tokenizer.json").exists():
                raise refuse(f"The tokenizer of {home} has no fast form, which this server needs.")
    return final


def _slug(name: str) -> str:
    """A file name's part that is safe and short."""
    return re.sub(r"[^\w.-]", "_", name)[:80]


def _brief(error: Exception) -> str:
    """The first line of somebody else's exception, for the operator's terminal."""
    text = (str(error).strip() or "no message").splitlines()[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {text}"


def _emit(stream: object, record: dict[str, object]) -> None:
    print(json.dumps(record), file=stream, flush=True)   # type: ignore[call-overload]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine_proc.prepare", allow_abbrev=False)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out-root", required=True, type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stdout = sys.stdout
    try:
        # Libraries print what they like; our protocol has standard output for itself, the sentence standard error.
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            result = prepare(
                options.source, options.out_root.expanduser(), options.tokenizer, options.trust_remote_code,
                lambda phase, percent: _emit(stdout, {"phase": phase, "percent": percent}))
    except StartError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except Exception as error:  # the last resort: a sentence, not a traceback
        print(f"The model '{options.source}' cannot be prepared ({_brief(error)}).", file=sys.stderr)
        return MODEL_LOAD
    _emit(stdout, dict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
