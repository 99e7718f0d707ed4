"""The maths that families of mixers share, in plain PyTorch: each as a loop, which is the definition,
and as a parallel or chunked form with the same signature."""
