"""Stage one."""

import os

# Encoding, in the background of the detector, is small NumPy products. OpenBLAS would give them a thread for each
# core, which goes on spinning after each and takes the cores from PyTorch: on two of them extraction took 2.8 times as
# long. It reads this when NumPy is first loaded, which is after this line in every `python -m extract`.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
