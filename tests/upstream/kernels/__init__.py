"""Put on PYTHONPATH, this folder lets a hybrid model train on CPU: slow stand-ins for `mamba_ssm`; a spec without TE.

`mamba_ssm` holds what Megatron's MambaMixer imports from the package of that name, which needs Triton and a GPU.
"""
