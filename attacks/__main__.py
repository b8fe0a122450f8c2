"""Lets ``python -m attacks`` do what ``attacks`` does."""

from attacks.cli import main

if __name__ == "__main__":
    main()
