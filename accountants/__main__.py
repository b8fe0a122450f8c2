"""``python -m accountants``."""

from accountants.cli import main

if __name__ == "__main__":
    main()
