"""`python -m statespan`: the command line where no script is installed, as in a job's uploaded working directory."""

from statespan.cli import main

main()
