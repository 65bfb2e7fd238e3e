"""`python -m fedunlearn.study dataset=cifar10`: the paper's study, or what is missing of it."""

import sys

from fedunlearn.study.command import main

if __name__ == "__main__":
    sys.exit(main())
