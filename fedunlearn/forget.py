"""`python -m fedunlearn.forget --client 3`, which is `fedunlearn forget --client 3`."""

import sys

from fedunlearn.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["forget"]
    main()
