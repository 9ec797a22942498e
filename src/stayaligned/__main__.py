"""Run the command as `python -m stayaligned`."""

from stayaligned.cli import main

if __name__ == "__main__":
    main()
