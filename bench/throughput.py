"""Pictures a second over batch sizes, and latency under load: `dar bench throughput` as a script.

python bench/throughput.py [--model demo] [--requests N] [--quick] [--json] [--out F]
"""

import sys

from dar_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "throughput", *sys.argv[1:]]))
