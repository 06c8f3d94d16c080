"""A small S3 server, in memory and in a thread: what pyarrow's own client needs of the protocol, with real S3's rules
(no folders, no append, no rename, a listing in pages). Signatures are not checked."""

from __future__ import annotations

import io
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

PAGE = 20
"""Keys of one page of a listing, few on purpose: a client that forgets the next page is found out."""


class Bucket(ThreadingHTTPServer):
    """All buckets of one server; any name is one."""

    daemon_threads = True
    request_queue_size = 128  # clients open many connections at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        """"bucket/key" -> content."""
        self.parts: dict[str, dict[int, bytes]] = {}
        """Multipart upload -> part number -> content."""

    def uri(self, place: str) -> str:
        """The URI of "bucket/key" for pyarrow; credentials come from the environment."""
        return f"s3://{place}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Bucket

    def log_message(self, *words: object) -> None:
        pass

    def parse(self) -> None:
        split = urlsplit(self.path)
        self.key = unquote(split.path).strip("/") + ("/" if split.path.count("/") > 1 and split.path[-1] == "/" else "")
        self.query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b"".join(self.chunks(self.rfile))
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            data = b"".join(self.chunks(io.BytesIO(data)))
        return data

    @staticmethod
    def chunks(stream: IO[bytes]) -> Iterator[bytes]:
        """Both HTTP's and AWS's chunks: "<hex size>[;signature]", the data, at the end "0" and headers."""
        while size := int(stream.readline().split(b";")[0], 16):
            yield stream.read(size)
            stream.readline()
        while stream.readline().strip():
            pass

    def answer(self, status: int = 200, body: bytes | str = b"", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        fixed = {"Content_Length": str(len(data)), "ETag": '"e"', "Last_Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
        for name, value in (fixed | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self) -> None:
        self.answer(404, "<Error><Code>NoSuchKey</Code><Message>there is no such key</Message></Error>")

    def do_HEAD(self) -> None:
        self.parse()
        if "/" not in self.key:  # pyarrow asks for a bucket that nobody has, to learn what kind of server this is
            self.answer(404 if "extremelyunlikely" in self.key else 200)
        elif self.key in self.server.objects:
            self.answer(body=self.server.objects[self.key], Accept_Ranges="bytes")
        else:
            self.answer(404)

    def do_GET(self) -> None:
        self.parse()
        if "list-type" in self.query:
            self.list()
        elif self.key not in self.server.objects:
            self.missing()
        elif span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            data = self.server.objects[self.key]
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")
        else:
            self.answer(body=self.server.objects[self.key])

    def list(self) -> None:
        bucket, prefix, delimiter = self.key.rstrip("/"), self.query.get("prefix", ""), self.query.get("delimiter", "")
        after, limit = self.query.get("continuation-token", ""), min(PAGE, int(self.query.get("max-keys", PAGE)))
        found = [key for key in list(self.server.objects) if key.startswith(f"{bucket}/{prefix}")]
        keys = sorted(key[len(bucket) + 1 :] for key in found)
        entries = {}  # key or common prefix -> size or None
        for key in keys:
            rest = key[len(prefix) :]
            folder = prefix + rest.split(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            entries[folder or key] = None if folder else len(self.server.objects.get(f"{bucket}/{key}", b""))
        names = [name for name in entries if name > after]
        shown = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if entries[name] is None
            else f"<Contents><Key>{escape(name)}</Key><Size>{entries[name]}</Size>"
            "<LastModified>2026-11-01T00:00:00.000Z</LastModified></Contents>"
            for name in names[:limit]
        )
        more = len(names) > limit
        token = f"<NextContinuationToken>{escape(names[limit - 1])}</NextContinuationToken>" if more else ""
        self.answer(
            body=f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"<KeyCount>{len(names[:limit])}</KeyCount>{token}{shown}</ListBucketResult>"
        )

    def do_PUT(self) -> None:
        self.parse()
        data = self.body()
        if "uploadId" in self.query:
            self.server.parts[self.query["uploadId"]][int(self.query["partNumber"])] = data
            self.answer()
        elif source := self.headers.get("x-amz-copy-source"):
            self.server.objects[self.key] = self.server.objects[unquote(source).strip("/")]
            self.answer(body='<CopyObjectResult><ETag>"e"</ETag></CopyObjectResult>')
        else:
            if "/" in self.key:
                self.server.objects[self.key] = data
            self.answer()

    def do_POST(self) -> None:
        self.parse()
        data = self.body()
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            self.server.parts[upload] = {}
            self.answer(
                body=f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        elif "uploadId" in self.query:
            parts = self.server.parts.pop(self.query["uploadId"])
            self.server.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
            self.answer(body='<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>')
        else:  # delete many
            bucket = self.key.rstrip("/")
            for element in ElementTree.fromstring(data).iter():
                if element.tag.endswith("Key"):
                    self.server.objects.pop(f"{bucket}/{element.text}", None)
            self.answer(body="<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        self.parse()
        self.server.parts.pop(self.query.get("uploadId", ""), None)
        if "uploadId" not in self.query:
            self.server.objects.pop(self.key, None)
        self.answer(204)


@contextmanager
def serve() -> Iterator[Bucket]:
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
