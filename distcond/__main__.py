"""`python -m distcond` is the command `distcond`: what jobs on a cluster call, where no script need be on the PATH."""

from distcond.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
