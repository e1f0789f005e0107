"""`python -m car_datasets` is `car-datasets`: the entry point of the command line."""

import sys


def main() -> None:
    """Run the command line; a signal during its imports ends it as quietly as one during a command."""
    from car_datasets.utils.processes import exit_code, terminable

    with terminable():
        try:
            from car_datasets.cli import app

            app(prog_name="car-datasets")
        except KeyboardInterrupt as stop:
            sys.exit(exit_code(stop))


if __name__ == "__main__":  # a spawned worker imports this module and must not run the command again
    main()
