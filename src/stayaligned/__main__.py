"""`python -m stayaligned` is the command."""

from stayaligned.cli import main

if __name__ == "__main__":
    main()
