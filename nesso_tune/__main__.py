"""`python -m nesso_tune`: the same command line, so that `accelerate launch -m nesso_tune train …` works."""

from nesso_tune.cli.main import main

if __name__ == "__main__":
    main()
