#!/usr/bin/env python3
"""Stores one byte in PAGES random pages of a shared mapping of a file and syncs it; prints a line as `load` does."""
import json, mmap, os, random, sys, time

path, size, pages, seed = sys.argv[1], *map(int, sys.argv[2:])
order = random.Random(seed)
places = [order.randrange(size // 4096) * 4096 for _ in range(pages)]
descriptor = os.open(path, os.O_RDWR)
with mmap.mmap(descriptor, size) as mapping:
    began = time.monotonic()
    for place in places:
        mapping[place] = seed & 255
    mapping.flush()
    seconds = time.monotonic() - began
print(json.dumps({"operations": pages, "bytes": pages, "seconds": seconds}))
