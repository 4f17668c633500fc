"""`python -m benchmarks.studies`."""

from benchmarks.studies.studies import main

if __name__ == "__main__":
    main()
