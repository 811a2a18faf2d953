"""The planned memory beside a measured peak: `dar bench memory` as a script.

python bench/memory.py --prior L --tokenizer v1 --random-weights [--budget-gb 80] [--json]
"""

import sys

from dar_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "memory", *sys.argv[1:]]))
