"""The maths that families of mixers share, in plain PyTorch: each as a loop, which is the definition,
and as a parallel or chunked form with the same signature.

Which form runs is the op's choice among those that its argument `form` names: the loop, the parallel form, or
the kernel, which is the function of the same name in the file of the same name in holdall/kernels. What a
kernel cannot take, `kernel_refusal` of the op's file says.
"""
