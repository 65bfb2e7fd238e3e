"""`python -m fedunlearn`, which is `fedunlearn`."""

from fedunlearn.cli import main

if __name__ == "__main__":
    main()
