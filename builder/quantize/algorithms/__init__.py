"""How the codes and block scales of NVFP4 weights are chosen with calibration rows. Imports torch."""
