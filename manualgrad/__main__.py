"""python -m manualgrad coverage: the table of operations that have a hand-written gradient."""

import argparse

from manualgrad import registry

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m manualgrad", description=__doc__)
    parser.add_argument("command", choices=["coverage"])
    parser.parse_args()
    print(registry.markdown())
