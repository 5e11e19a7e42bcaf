"""Multipart uploads: form fields into a dictionary, the one file into a bounded spool file on its way in.

A spool file belongs to the request that it came with and goes when that is closed; what a dead frontend left behind goes
when its successor starts. Run by the frontend. Nothing is ever held whole in memory, and the limit counts while it comes.
"""
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from frontend.call import Call
from pipeline.errors import QuartetError, invalid

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_HEADER_BYTES = 4096              # of one part
OVERHEAD = 256 * 1024                # of a body beyond its file
UPLOAD_TIMEOUT_S = 600.0
log = logging.getLogger(__name__)


class Spool:
    """The directory of one frontend's uploads, in the run directory."""

    def __init__(self, run_dir: str, index: int) -> None:
        self._directory = Path(run_dir) / f"spool.{index}"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._count = 0
        for left in self._directory.iterdir():
            left.unlink(missing_ok=True)

    def open(self) -> tuple[Path, BinaryIO]:
        self._count += 1
        path = self._directory / str(self._count)
        return path, open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")


@dataclass(slots=True)
class Form:
    """What arrived. `path` is the spool file, which whoever holds this deletes."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    path: Path | None = None
    filename: str = ""
    size: int = 0

    def discard(self) -> None:
        """Delete the spool file; idempotent."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.path = None


async def receive(call: Call, spool: Spool, max_file: int) -> Form:
    """Read a multipart body whose file field is called `file`; QuartetError for anything else."""
    media, options = parse_options_header(call.http.headers.getone("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if media != b"multipart/form-data" or not boundary or len(boundary) > 200:
        raise QuartetError("unsupported_media_type", "The body must be sent as multipart/form-data.")
    reader = _Reader(spool, max_file)
    try:
        parser = MultipartParser(boundary, {
            "on_part_begin": reader.begin, "on_part_data": reader.data, "on_part_end": reader.end,
            "on_header_field": reader.header_name, "on_header_value": reader.header_value,
            "on_header_end": reader.header_end, "on_headers_finished": reader.headers_finished, "on_end": reader.finish})
        async for data in call.chunks(max_file + OVERHEAD, UPLOAD_TIMEOUT_S):
            parser.write(data)
            await asyncio.sleep(0)
        if not reader.complete:
            raise QuartetError("invalid_request", "The multipart body breaks off.")
        if reader.form.path is None:
            raise invalid("The field 'file' is required, as a file.", "file")
        if not reader.form.size:
            raise invalid("The file is empty.", "file")
        reader.kept = True
        return reader.form
    except MultipartParseError:
        raise QuartetError("invalid_request", "The multipart body is malformed.") from None
    except OSError as error:
        log.error("an upload could not be spooled: %s", error.strerror)
        raise QuartetError("insufficient_storage", "The server has no room for this upload; retry later.") from None
    finally:
        reader.close()


class _Reader:
    """The callbacks of the parser."""

    def __init__(self, spool: Spool, max_file: int) -> None:
        self.form = Form()
        self.complete = self.kept = False
        self._spool, self._max_file = spool, max_file
        self._parts = self._header_bytes = 0
        self._name = b""
        self._header: tuple[bytearray, bytearray] = bytearray(), bytearray()
        self._disposition = b""
        self._value = bytearray()
        self._file: BinaryIO | None = None

    def begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise QuartetError("invalid_request", f"The multipart body has more than {MAX_PARTS} parts.")
        self._header_bytes, self._disposition, self._name, self._value = 0, b"", b"", bytearray()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[0].extend(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[1].extend(data[start:end])

    def header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = bytearray(), bytearray()

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"")
        if b"filename" in options or b"filename*" in options:
            if self._name != b"file" or self.form.path is not None:
                raise invalid("The body must hold one file, in the field 'file'.", "file")
            self.form.filename = options.get(b"filename", b"")[:255].decode(errors="replace")
            self.form.path, self._file = self._spool.open()

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self.form.size += end - start
            if self.form.size > self._max_file:
                raise QuartetError("payload_too_large", f"The file is larger than {self._max_file >> 20} MiB.", "file")
            self._file.write(memoryview(data)[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > MAX_FIELD_BYTES:
            raise invalid(f"A field may have at most {MAX_FIELD_BYTES} bytes.", self._name[:64].decode(errors="replace"))

    def end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            return
        try:
            name, value = self._name.decode(), self._value.decode()
        except UnicodeDecodeError:
            raise QuartetError("invalid_request", "The fields of the body must be UTF-8 text.") from None
        if name == "file":
            raise invalid("The field 'file' must be a file, with a name.", "file")
        self.form.fields.setdefault(name.removesuffix("[]"), []).append(value)

    def finish(self) -> None:
        self.complete = True

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise QuartetError("invalid_request", "A part of the multipart body has too large a header.")

    def close(self) -> None:
        """Whatever happens, no descriptor stays open, and no file without an owner."""
        if self._file is not None:
            self._file.close()
        if not self.kept:
            self.form.discard()
