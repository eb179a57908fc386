"""How this folder was recorded: the real img2dataset against a server on the loopback interface.

    python -m venv /tmp/recorder && /tmp/recorder/bin/pip install img2dataset==1.47.0 "setuptools<80"
    /tmp/recorder/bin/python tests/preprocessing/recorded/build.py OUT

It needs img2dataset's own environment (it pins old versions of libraries that this project uses), so it imports
nothing of this project. Run times and key order differ between recordings; what the tests say does not.
"""

import io
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import download
from PIL import Image

ROWS = 24
PER_SHARD = 10
MISSING = {3, 12, 13, 22}  # the server answers 404
BROKEN = {17}  # the server answers with a page
CAPTIONS = {5: None, 6: "", 8: "cats &amp; dogs", 15: "  two\n lines ", 20: "café"}
FORMATS = ("jpg", "png", "webp")


def picture(number: int) -> bytes:
    """Return a small two-coloured picture, wide or tall by turns."""
    size = (48, 36) if number % 2 else (36, 48)
    image = Image.new("RGB", size, (10 * number, 255 - 10 * number, 77))
    image.paste((255, 255, 255), (4, 4, 4 + number % 9, 12))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves /NUMBER.png."""

    def do_GET(self) -> None:
        number = int(Path(self.path).stem)
        body = b"<html>gone</html>" if number in BROKEN else picture(number)
        self.send_response(404 if number in MISSING else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        return None


def main(out: Path) -> None:
    """Record one folder for each format of pictures, and one of parquet shards."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "url": [f"http://127.0.0.1:{server.server_port}/{number}.png" for number in range(ROWS)],
            "caption": [CAPTIONS.get(number, f"a caption number {number}") for number in range(ROWS)],
            "similarity": [round(0.1 + 0.03 * number, 2) for number in range(ROWS)],
            "NSFW": ["NSFW" if number == 9 else "UNLIKELY" for number in range(ROWS)],
        }
    )
    pq.write_table(table, out / "urls.parquet")
    for name in (*FORMATS, "parquet"):
        shutil.rmtree(out / name, ignore_errors=True)
        download(
            url_list=str(out / "urls.parquet"),
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            save_additional_columns=["similarity", "NSFW"],
            output_format="parquet" if name == "parquet" else "webdataset",
            output_folder=str(out / name),
            encode_format="jpg" if name == "parquet" else name,
            encode_quality=9 if name == "png" else 90,
            image_size=32,
            resize_mode="keep_ratio",
            number_sample_per_shard=PER_SHARD,
            processes_count=1,
            thread_count=4,
            retries=0,
            disallowed_header_directives=[],
        )
    (out / "urls.parquet").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
