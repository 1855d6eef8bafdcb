"""`launch/pretrain.py` under the name that Megatron's users know: it builds what the flags say, a GPT by default."""

from pretrain import main

if __name__ == "__main__":
    main()
