"""`python -m rayft.train RECIPE key=value ...`: `rayft train`, for `ray job submit`."""

import sys

from rayft.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
