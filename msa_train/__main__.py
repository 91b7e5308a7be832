"""`python -m msa_train` is `msa-train`: launchers that start ranks by module, torchrun among them, need one."""

from msa_train.cli import main

if __name__ == "__main__":
    main()
