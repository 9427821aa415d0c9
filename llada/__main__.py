"""`python -m llada`, and each rank of torchrun or srun."""

from llada.cli import main

if __name__ == "__main__":
    main()
