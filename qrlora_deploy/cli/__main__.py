"""`python -m qrlora_deploy.cli`, the same as the console script."""

from qrlora_deploy.cli import main

main()
