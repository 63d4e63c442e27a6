"""``python -m htsat``: the same as the ``htsat`` command."""

from htsat.cli import main

if __name__ == "__main__":
    main()
