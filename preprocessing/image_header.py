"""What the first bytes of an untrusted picture say, judged before a pixel is decoded.

A decode inside the worker cannot be interrupted, so its cost is bounded beforehand by arithmetic on the header:
memory by width x height (at most 16 bytes a pixel with every copy, 1 GB at the default of 64 million), time by the
same, by the number of scans of a JPEG (each one goes over all pixels again), and by the size of the file. Limits
like these give the same verdict on every machine, however loaded. Against a decoder's own bugs there is
`decode_processes`.
"""

from preprocessing.filters import Rejection

FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
OTHER_FORMATS = (
    *(b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"%PDF", b"%!PS", b"\xc5\xd0\xd3\xc6"),
    *(b"<svg", b"\0\0\1\0", b"8BPS", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\x76\x2f\x31\x01"),
    *(b"\xd7\xcd\xc6\x9a", b"\1\0\x09\0\0\3"),
)
START_OF_SCAN = b"\xff\xda"
MAX_SCANS = 100
"""libjpeg's own progressive script has 10, the longest in use about 30; each costs a pass over the picture."""
BYTES_A_PIXEL, METADATA_BYTES = 16, 8 << 20
"""16-bit RGBA without compression takes 8 bytes a pixel; the rest of a file is profile, EXIF and comments."""


def image_format(payload: bytes) -> str | Rejection:
    """Return "PNG", "JPEG" or "WEBP" by the first bytes, or the rejection of anything else."""
    if not payload:
        return Rejection("empty")
    for magic, kind in FORMATS.items():
        if payload.startswith(magic):
            return kind
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "WEBP"
    start = payload[:256]
    known = start.lstrip().startswith(OTHER_FORMATS) or start.startswith(OTHER_FORMATS)
    return Rejection("format" if known or payload[4:8] == b"ftyp" else "not_image")


def cost_problem(payload: bytes, height: int, width: int) -> str | None:
    """Return why decoding would cost more than the picture can be worth, or None."""
    return "too_many_bytes" if len(payload) > BYTES_A_PIXEL * height * width + METADATA_BYTES else None


def scans_problem(payload: bytes, first_scan: int, channels: int, progressive: bool) -> str | None:
    """Return why a JPEG whose first scan's data begins at byte `first_scan` is not decoded, or None.

    A sequential JPEG whose first scan holds all channels is read in one pass, whatever follows (libjpeg's
    `has_multiple_scans`); only the others can ask for more passes, so only they are searched.
    """
    header = payload.rfind(START_OF_SCAN, 0, first_scan)
    in_first_scan = payload[header + 4] if header >= 0 else 0
    if not progressive and in_first_scan == channels:
        return None
    return "too_many_scans" if payload.count(START_OF_SCAN, max(0, header)) > MAX_SCANS else None
