"""``python -m fixpoint``: the command ``fixpoint``, where its script is not on the path."""

from fixpoint_cli import main

if __name__ == "__main__":
    main()
