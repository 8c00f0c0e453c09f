"""``python -m qlens`` is the command ``qlens``."""

from qlens.cli.app import main

if __name__ == "__main__":
    main()
