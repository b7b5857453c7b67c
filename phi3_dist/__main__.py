"""`python -m phi3_dist` is `phi3-dist`, so that `accelerate launch -m phi3_dist` starts it."""

from phi3_dist.cli import main

if __name__ == "__main__":
    main()
