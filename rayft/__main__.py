"""`python -m rayft` is `rayft`."""

from rayft.cli import main

main()
