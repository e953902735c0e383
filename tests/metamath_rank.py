"""The paper's run as a rank's script in tests: torchrun -m tests.metamath_rank OPTIONS."""

from benchmarks.forgetting import metamath
from tests.leave_ranks import leave_ranks

if __name__ == "__main__":
    metamath.main()
    leave_ranks()
