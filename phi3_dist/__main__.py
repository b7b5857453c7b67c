"""`python -m phi3_dist` is `phi3-dist`, so that `accelerate launch -m phi3_dist` starts it."""

import sys


def main() -> None:
    """The command line. A signal is answered before the first slow import."""
    from phi3_dist.training.signals import answered, starts_a_run

    with answered(sys.argv[1:]):
        from phi3_dist.cli import main as run

        if starts_a_run(sys.argv[1:]):
            run()
            return
    run()


if __name__ == "__main__":
    main()
