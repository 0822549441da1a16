"""One run: condense, prune, evaluate. ``python run.py dataset=cifar10 memory=ipc10 seed=1``"""

from hmn.cli import main

if __name__ == "__main__":
    main()
