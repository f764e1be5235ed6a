"""A program that uses the library and does not configure logging: trains the recipe named on its command line."""

import sys

from nesso_tune import load_recipe, train

if __name__ == "__main__":
    train(load_recipe(sys.argv[1]))
