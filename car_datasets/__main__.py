"""`python -m car_datasets` is `car-datasets`."""

from car_datasets.cli import app

if __name__ == "__main__":  # a spawned worker imports this module and must not run the command again
    app(prog_name="car-datasets")
