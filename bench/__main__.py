"""`make bench`: every measurement, one after the other. Builds the peers on first use; takes about half an hour."""

from __future__ import annotations

from bench import agreement, conversion, picture, quality

for measurement in (conversion, agreement, quality, picture):
    print(f"\n## {measurement.__name__.removeprefix('bench.')}\n\n{measurement.__doc__}\n", flush=True)
    measurement.main()
