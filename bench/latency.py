"""Seconds of one picture beside its floor and the plain path: `dar bench latency` as a script.

python bench/latency.py --prior L --tokenizer v1 --random-weights [--quick] [--json] [--out F]
"""

import sys

from dar_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "latency", *sys.argv[1:]]))
