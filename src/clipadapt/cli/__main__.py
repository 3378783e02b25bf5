"""`python -m clipadapt.cli`: the same as the command `clipadapt`."""

from clipadapt.cli import main

if __name__ == "__main__":
    main()
