"""`python -m llada`; also what torchrun and srun start as each rank."""

from llada.cli import main

if __name__ == "__main__":
    main()
