"""`python -m vidworld`, the same as the `vidworld` command."""

from vidworld.cli import main

main()
